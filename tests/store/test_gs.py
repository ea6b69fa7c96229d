"""A set in Google's storage: packed to ``gs://``, verified and trained from there, against an emulator on the loopback.

The emulator (PyPI: gcp-storage-emulator) answers the requests that Google's own client, inside Arrow, makes; it checks no
credentials, so these tests go without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import assert_links, put
from epochs import epoch_of, same, scores_of
from gs_server import running_emulator
from s3_server import free_ports

from medtl_dist.data.shards import Dataset, open_dataset, read_split
from medtl_dist.data.upload import staged_upload
from medtl_dist.data.verify import verify
from medtl_dist.errors import DataError, Interrupted, UserError
from medtl_dist.storage import Folder, StorageOptions
from medtl_dist.store_folder import store_folder

pytestmark = pytest.mark.store
STORAGE = StorageOptions(anonymous=True, timeout_s=2.0, retries=1)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_emulator(tmp_path_factory.mktemp("gs")) as url:
        yield url


@pytest.fixture(autouse=True)
def endpoint(emulator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", emulator)


@pytest.fixture
def remote(local: Dataset, request: pytest.FixtureRequest) -> Dataset:
    address = f"gs://sets/{request.node.name[:40]}/set"
    put(local, address, STORAGE)
    return open_dataset(address, STORAGE)


def test_a_set_in_googles_storage_is_the_set_on_disk(local: Dataset, remote: Dataset) -> None:
    assert (remote.sha256, remote.info) == (local.sha256, local.info)
    for split in local.splits:
        assert read_split(remote, split).equals(read_split(local, split))
    assert same(epoch_of(remote), epoch_of(local))
    assert same(scores_of(remote), scores_of(local))
    there, here = verify(remote.folder, storage=STORAGE, num_workers=1), verify(local.folder, num_workers=1)
    assert (there.faults, there.num_samples) == (here.faults, here.num_samples)  # made-up groups, of the fixture


def test_a_damaged_byte_and_a_missing_shard_are_named(local: Dataset, remote: Dataset) -> None:
    folder = Folder.at_url(remote.folder, STORAGE)
    shard = local.shards("train")[0].name
    data = bytearray(folder.read(shard))
    data[len(data) // 2] ^= 1
    folder.write(shard, bytes(data))
    with pytest.raises(DataError, match=rf"{remote.folder}/{shard}: .*differ"):
        epoch_of(remote)
    folder.delete(shard)
    with pytest.raises(DataError, match=rf"{remote.folder}/{shard} is missing"):
        epoch_of(open_dataset(remote.folder, STORAGE))


def test_a_file_is_linked_by_a_copy() -> None:
    assert_links(store_folder("gs://sets/linked", STORAGE))


def test_a_set_is_put_whole_and_never_over_another(local: Dataset, tmp_path: Path) -> None:
    def write(place: Path) -> None:
        place.mkdir()
        for path in Path(local.folder).iterdir():
            (place / path.name).write_bytes(path.read_bytes())

    with staged_upload("gs://sets/whole/set", tmp_path, STORAGE) as place:
        write(place)
    assert same(epoch_of(open_dataset("gs://sets/whole/set", STORAGE)), epoch_of(local))
    with (
        pytest.raises(UserError, match="gs://sets/whole/set holds a shard set already"),
        staged_upload("gs://sets/whole/set", tmp_path, STORAGE),
    ):
        pass


def test_a_server_that_is_gone_is_named_in_bounded_time(remote: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    [closed] = free_ports(1)
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{closed}")
    began = time.monotonic()
    with pytest.raises(Interrupted, match=r"gs://sets/"):
        open_dataset(f"{remote.folder}-2", STORAGE)
    assert time.monotonic() - began < 30
