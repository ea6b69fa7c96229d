"""Putting a packed set to a store (data/upload.py); the store is a folder here, tests/store has a real one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from medtl_dist.data import upload
from medtl_dist.errors import Interrupted, UserError
from medtl_dist.storage import Folder, StorageOptions

FILES = ("dataset.json", "index.parquet", "train-000000.tar", "train-000001.tar")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "store"
    place.mkdir()
    monkeypatch.setattr(Folder, "at_url", classmethod(lambda cls, url, options=None: Folder.local(place)))
    return place


def packed_into(folder: Path) -> None:
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(name)


def test_the_set_arrives_whole_and_nothing_else_stays(store: Path, tmp_path: Path) -> None:
    with upload.staged_upload("s3://bucket/set", tmp_path / "staging") as folder:
        packed_into(folder)
    assert {path.name: path.read_text() for path in store.iterdir()} == {name: name for name in FILES}
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_stop_while_uploading_keeps_the_packed_set_and_clears_the_store(store: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with (
        pytest.raises(Interrupted, match=r"the upload was stopped; the packed set is whole in ") as stopped,
        upload.staged_upload("s3://bucket/set", tmp_path / "staging", progress=stop) as folder,
    ):
        packed_into(folder)
    assert list(store.iterdir()) == []
    kept = Path(stopped.value.message.split("whole in ")[1].split(": copy")[0])
    assert sorted(path.name for path in kept.iterdir()) == sorted(FILES)
    with upload.staged_upload("s3://bucket/set", tmp_path / "staging") as folder:  # the way is free
        packed_into(folder)


def test_what_another_writer_has_put_there_meanwhile_is_left_alone(store: Path, tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        (store / "test-000000.tar").write_text("theirs")

    with (
        pytest.raises(UserError, match="written to by somebody else meanwhile"),
        upload.staged_upload("s3://bucket/set", tmp_path / "staging", progress=progress) as folder,
    ):
        packed_into(folder)
    assert "dataset.json" not in {path.name for path in store.iterdir()}
    assert (store / "test-000000.tar").read_text() == "theirs"


def test_a_server_that_takes_the_bytes_but_never_the_last_is_given_up(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, tries = threading.Event(), []

    def trickle(packed: Path, name: str, folder: Folder) -> None:
        tries.append(name)
        over.wait(60)

    monkeypatch.setattr(upload, "_put_once", trickle)
    try:
        with (
            pytest.raises(Interrupted, match=r"no answer within 0 s.*the packed set is whole in "),
            upload.staged_upload(
                "s3://bucket/set", tmp_path / "staging", StorageOptions(timeout_s=0.05, retries=0)
            ) as folder,
        ):
            packed_into(folder)
    finally:
        over.set()
    assert tries.count("index.parquet") == 3
