"""`medtl data pack --out s3://…` and `medtl train` from there, on a real S3 server."""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from faulty_proxy import Fault, Proxy
from s3_server import SECRET_KEY, S3Server

from medtl_dist.cli.main import run
from medtl_dist.config import load_config
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.sources import Columns
from medtl_dist.data.upload import staged_upload
from medtl_dist.demo_data import write_demo_images
from medtl_dist.errors import Interrupted, UserError
from medtl_dist.storage import Folder, StorageOptions

pytestmark = pytest.mark.store


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of made-up radiographs, 24 patients."""
    place = tmp_path_factory.mktemp("demo")
    (place / "key").write_text("5a" * 32)
    return write_demo_images(place / "images", num_patients=24, seed=1, image_size_px=32)


@pytest.fixture(autouse=True)
def endpoint(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store(address: str, s3: S3Server) -> Folder:
    return Folder.at_url(address, StorageOptions(endpoint_url=s3.url))


def options_for(table: Path) -> PackOptions:
    columns = Columns(group=("patient_id",))
    return PackOptions(columns=columns, fractions=(0.6, 0.2, 0.2), num_workers=1, key_file=table.parent.parent / "key")


def pack_command(table: Path, out: str) -> list[str]:
    command = ["data", "pack", str(table), "--out", out, "--group-col", "patient_id", "--split", "0.6,0.2,0.2"]
    return [*command, "--key-file", str(table.parent.parent / "key"), "--workers", "1"]


def tidy(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_set_packed_to_a_store_is_the_one_packed_to_disk_and_trains_the_same(
    table: Path, address: str, store: Folder, proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pack_command(table, address)) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{address}: ")
    assert f"{tmp_path / 'set.private'} names files and patients" in said
    puts = [request.path.split("?")[0].rsplit("/", 1)[1] for request in proxy.requests if request.method != "GET"]
    assert puts.index("dataset.json") > max(
        place for place, name in enumerate(puts) if name.endswith((".tar", ".parquet"))
    )
    assert tidy(tmp_path) == ["set.private"]  # no staging left
    assert stat.S_IMODE(os.stat(tmp_path / "set.private").st_mode) == 0o700

    local = pack(table, tmp_path / "local", options_for(table))
    assert store.names() == tidy(Path(local.folder))  # no mark, no key, no linkage
    for name in store.names():
        assert store.read(name) == (Path(local.folder) / name).read_bytes()

    smoke = [
        "--preset",
        "smoke",
        "--set",
        "train.threads=1",
        "--set",
        "train.epochs=1",
        "--set",
        "data.loader_workers=0",
    ]
    for name, place in (("near", local.folder), ("far", address)):
        assert run(["train", *smoke, "--set", f"data.shards={place}", "--run-dir", str(tmp_path / name)]) == 0
    near, far = (pq.read_table(tmp_path / name / "predictions" / "val.parquet") for name in ("near", "far"))
    assert near.num_rows > 0
    assert far.equals(near)
    config = load_config(file=tmp_path / "far" / "config.yaml")
    assert config.data.shards == address
    assert config.sha256() == load_config(file=tmp_path / "near" / "config.yaml").sha256()
    for path in (tmp_path / "far").rglob("*"):
        assert path.is_dir() or SECRET_KEY.encode() not in path.read_bytes()


def test_a_place_in_use_is_refused(table: Path, address: str, store: Folder, tmp_path: Path) -> None:
    store.write("note.txt", b"somebody's")
    with pytest.raises(UserError, match=rf"{address} is not empty \(1 entries\)"):
        pack(table, address, options_for(table))
    store.delete("note.txt")
    store.write("dataset.json", b"{}")
    with pytest.raises(UserError, match=rf"{address} holds a shard set already"):
        pack(table, address, options_for(table))
    assert store.names() == ["dataset.json"]
    assert tidy(tmp_path) == []
    with pytest.raises(UserError, match="a web server can only be read from"):
        pack(table, "https://127.0.0.1/set", options_for(table))
    with pytest.raises(UserError, match="no such bucket"):
        pack(table, "s3://nobody-has-this/set", options_for(table))
    inside = dataclasses.replace(options_for(table), private=tmp_path / "set" / "private")
    with pytest.raises(UserError, match="it names patients, so name a folder elsewhere"):
        pack(table, tmp_path / "set", inside)


def test_of_two_packers_at_one_address_only_one_writes(table: Path, address: str, store: Folder, proxy: Proxy) -> None:
    at_it, go_on = threading.Event(), threading.Event()

    def progress(done: int, total: int) -> None:
        at_it.set()
        assert go_on.wait(30)

    results: list[object] = []
    first = threading.Thread(target=lambda: results.append(pack(table, address, options_for(table), progress)))
    first.start()
    assert at_it.wait(30)
    with pytest.raises(UserError, match="another process is packing to"):
        pack(table, address, options_for(table))
    go_on.set()
    first.join(60)
    assert len(results) == 1
    assert "dataset.json" in store.names()
    assert not [name for name in store.names() if name.startswith(".")]


def test_a_failed_upload_keeps_the_packed_set_and_leaves_no_part_of_one(
    table: Path, address: str, store: Folder, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medtl_dist.data.upload.time.sleep", lambda seconds: None)
    proxy.choose = lambda r: Fault("403") if "index.parquet" in r.path and r.method in ("PUT", "POST") else None
    with pytest.raises(UserError, match=rf"access refused .*copy it to {address}, dataset.json last") as caught:
        pack(table, address, options_for(table))
    assert "dataset.json" not in store.names()
    assert store.names() == []
    kept = next(path for path in tmp_path.iterdir() if path.name.startswith(".set.staging-"))
    assert str(kept / "set") in caught.value.message
    assert "dataset.json" in tidy(kept / "set")
    proxy.choose = lambda request: Fault("reset") if request.method == "GET" else None
    storage = StorageOptions(retries=0, timeout_s=1)
    with (
        pytest.raises(Interrupted, match=rf"{address}-2 can't be written to"),
        staged_upload(f"{address}-2", None, storage),
    ):
        raise AssertionError("nothing is packed for a store that can't be reached")
