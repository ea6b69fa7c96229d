"""`medtl data verify` of a set in a store: what is wrong is named as in a folder, and an absent store is no fault of the set."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import put
from faulty_proxy import Fault, Proxy, running_proxy
from image_folders import write_table
from s3_server import S3Server
from web_server import WebServer, running_web

from medtl_dist.cli import main
from medtl_dist.data import remote_file
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import Dataset, open_dataset
from medtl_dist.data.sources import Columns
from medtl_dist.data.verify import Report, verify
from medtl_dist.errors import Interrupted, UserError
from medtl_dist.storage import Folder, StorageOptions

FIRST, LAST = "train-000000.tar", "val-000001.tar"
INDEX_NOT_LISTED = "files that are no part of the set were not looked for: a web server does not list them"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("packed")
    source = write_table(folder / "in", 48, patients=24, splits=("train", "val"))
    columns = Columns(group=("split+patient_id",), split="split", domain="site", keep=("age",))
    return pack(source, folder / "set", PackOptions(columns=columns, num_workers=1))


@pytest.fixture
def folder(packed: Dataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.folder, tmp_path / "set"))


@pytest.fixture
def web(folder: Path) -> Iterator[WebServer]:
    with running_web(folder.parent) as site:
        yield site


def told(report: Report) -> list[tuple[str, str, str, str | None]]:
    return [(fault.kind, fault.file, fault.what, fault.key) for fault in report.faults]


def damage(folder: Path) -> None:
    """A flipped byte in an image, a broken header in the middle of another tar, a missing one, and one cut short."""
    raw = bytearray((folder / FIRST).read_bytes())
    raw[raw.index(b"IDAT") + 20] ^= 1
    (folder / FIRST).write_bytes(raw)
    raw = bytearray((folder / "train-000001.tar").read_bytes())
    raw[raw.index(b"ustar", 4096) - 200] ^= 1
    (folder / "train-000001.tar").write_bytes(raw)
    (folder / LAST).unlink()
    path = folder / "val-000000.tar"
    path.write_bytes(path.read_bytes()[:-1500])


@pytest.mark.parametrize("part_bytes", [9000, 2**23])
def test_over_http_the_same_is_found_as_in_a_folder(
    folder: Path, web: WebServer, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(remote_file, "PART_BYTES", part_bytes)
    whole = verify(f"{web.url}/set", 1)
    assert (whole.faults, whole.notes) == ([], [INDEX_NOT_LISTED])
    assert whole.lines()[-1] == f"{web.url}/set: 48 images in 6 shards: no fault found"
    damage(folder)
    here, there = verify(folder, 1), verify(f"{web.url}/set", 1)
    assert told(there) == told(here)
    assert {("missing", LAST), ("checksum", FIRST), ("image", FIRST), ("tar", "train-000001.tar")} <= {
        (fault.kind, fault.file) for fault in there.faults
    }
    assert any(what.startswith("is ") and file == "val-000000.tar" for _, file, what, _ in told(there))
    (folder / "index.parquet").unlink()
    assert ("missing", "index.parquet", "is missing", None) in told(verify(f"{web.url}/set", 1))


def test_a_shard_is_asked_for_once_and_not_kept(folder: Path, web: WebServer, tmp_path: Path) -> None:
    cache = StorageOptions(cache_dir=str(tmp_path / "cache"))
    with running_proxy(web.port) as proxy:
        assert verify(f"{proxy.url}/set", 1, storage=cache).faults == []
        for shard in (FIRST, LAST):
            assert proxy.count(shard, "HEAD") == proxy.count(shard, "GET") == 1
    assert not (tmp_path / "cache").exists()


def test_pages_in_place_of_tars_are_faults(folder: Path, web: WebServer) -> None:
    with running_proxy(web.port) as proxy:
        proxy.choose = lambda request: Fault("html") if request.path.endswith(FIRST) else None
        found = [(kind, what) for kind, file, what, _ in told(verify(f"{proxy.url}/set", 1)) if file == FIRST]
    assert any(kind == "tar" and "not a tar but a web page" in what for kind, what in found), found


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_that_goes_away_is_no_fault_of_the_set(folder: Path, web: WebServer, workers: int) -> None:
    quick = StorageOptions(timeout_s=0.5, retries=1)
    with running_proxy(web.port) as proxy:
        proxy.choose = lambda request: Fault("stall", 1000) if request.path.endswith(LAST) else None
        begun = time.monotonic()
        with pytest.raises(Interrupted, match=rf"{proxy.url}/set/{LAST} can't be read \(.*; \d tries in"):
            verify(f"{proxy.url}/set", workers, storage=quick)
    assert time.monotonic() - begun < 20
    with pytest.raises(Interrupted, match="can't be read"):
        verify(f"{proxy.url}/set", workers, storage=quick)


def test_the_command_takes_an_address(folder: Path, web: WebServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["data", "verify", f"{web.url}/set", "--workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"note: {INDEX_NOT_LISTED}"
    (folder / LAST).unlink()
    assert main.run(["data", "verify", f"{web.url}/set", "--workers", "1"]) == 3
    assert "missing: 1\n  val-000001.tar: is missing\n" in capsys.readouterr().out


def test_a_set_in_s3_is_checked_and_what_else_lies_there_is_told(
    folder: Path, s3: S3Server, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url)
    put(open_dataset(folder), address, s3)
    whole = verify(address, 1)
    assert (whole.faults, whole.notes) == ([], [])
    damage(folder)
    (folder / "train-000099.tar").touch()
    (folder / "Doe.txt").touch()
    store = Folder.at_url(address)
    for name in (LAST, "index.parquet"):
        store.delete(name)
    for path in folder.iterdir():
        store.write(path.name, path.read_bytes())
    found = told(verify(address, 2))
    assert found == told(verify(folder, 1))
    assert ("missing", LAST, "is missing", None) in found
    assert {("extra", "train-000099.tar"), ("extra", ".")} <= {fault[:2] for fault in found}
    assert "Doe" not in str(found)


def test_s3_that_stalls_is_no_fault_of_the_set(
    folder: Path, s3: S3Server, proxy: Proxy, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes with a call that hangs end all the same."""
    put(open_dataset(folder), address, s3)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    quick = StorageOptions(timeout_s=1.0, retries=1)
    proxy.choose = lambda request: Fault("stall", 1000) if LAST in request.path else None
    begun = time.monotonic()
    with pytest.raises(Interrupted, match=rf"{LAST} at {proxy.url} can't be read"):
        verify(address, 2, storage=quick)
    assert time.monotonic() - begun < 30
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="access refused"):
        verify(address, 1, storage=quick)
