"""Reading a set from a web server, through a proxy that breaks things: resumed where it broke, to the byte."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from epochs import epoch_of, same, scores_of
from faulty_proxy import Fault, Proxy, Request, running_proxy
from web_server import WebServer, running_web

from medtl_dist.data.ranges import ranges_of
from medtl_dist.data.shards import Dataset, open_dataset, read_split
from medtl_dist.errors import DataError, Interrupted, UserError
from medtl_dist.storage import StorageOptions

QUICK = StorageOptions(timeout_s=1.0, retries=3)


@pytest.fixture
def web(local: Dataset) -> Iterator[WebServer]:
    with running_web(Path(local.folder).parent) as site:
        yield site


@pytest.fixture
def proxy(web: WebServer) -> Iterator[Proxy]:
    with running_proxy(web.port) as running:
        yield running


def test_a_set_on_a_web_server_is_the_set_on_disk(local: Dataset, web: WebServer) -> None:
    remote = open_dataset(f"{web.url}/set/", QUICK)
    assert (remote.folder, remote.name, remote.sha256) == (f"{web.url}/set", "set", local.sha256)
    assert read_split(remote, "train").equals(read_split(local, "train"))
    assert same(epoch_of(remote), epoch_of(local))
    assert same(scores_of(remote), scores_of(local))


@pytest.mark.parametrize(
    "fault", [Fault("reset", 3000), Fault("truncate", 5000), Fault("503"), Fault("stall", 2000)], ids=lambda f: f.kind
)
def test_faults_change_nothing_but_the_time(local: Dataset, proxy: Proxy, fault: Fault) -> None:
    remote = open_dataset(f"{proxy.url}/set", dataclasses.replace(QUICK, retries=15))  # see test_read_s3.py
    every = 25 if fault.kind == "stall" else 3
    numbers = itertools.count(1)

    def choose(request: Request) -> Fault | None:
        return None if next(numbers) % every else fault

    proxy.choose = choose
    begun = time.monotonic()
    assert same(epoch_of(remote), epoch_of(local))
    assert time.monotonic() - begun < 60
    assert len(proxy.requests) > every


def test_a_broken_range_goes_on_at_the_byte_where_it_broke(local: Dataset, proxy: Proxy) -> None:
    name = local.shards("train")[0].name
    raw = (Path(local.folder) / name).read_bytes()
    assert len(raw) > 60_000
    faults = iter([Fault("reset", 10_000), Fault("truncate", 1), Fault("503"), Fault("reset", 0)])
    proxy.choose = lambda request: next(faults, None)
    ranges = ranges_of(f"{proxy.url}/set", QUICK)
    assert bytes(ranges.read(name, 5, 50_000, len(raw))) == raw[5:50_000]
    starts = [int(request.range.removeprefix("bytes=").split("-")[0]) for request in proxy.requests]
    assert starts[0] == 5
    assert 5 < starts[1] <= 10_005  # a reset may take with it what the reader had not fetched yet
    assert starts[2:] == [starts[1] + 1] * 3


def test_a_server_gone_for_good_is_named_in_bounded_time(local: Dataset, web: WebServer) -> None:
    with running_proxy(web.port) as proxy:
        remote = open_dataset(f"{proxy.url}/set", QUICK)
    begun = time.monotonic()
    with pytest.raises(Interrupted, match=rf"{proxy.url}/set/.* can't be read \(could not connect to server; 4 tries"):
        epoch_of(remote)
    assert time.monotonic() - begun < 8


def test_pages_missing_files_and_servers_without_ranges_are_named(local: Dataset, web: WebServer) -> None:
    remote = open_dataset(f"{web.url}/set", QUICK)
    with pytest.raises(UserError, match=rf"no shard set at {web.url}/none: there is no dataset.json"):
        open_dataset(f"{web.url}/none", QUICK)
    web.ranges = False
    assert open_dataset(f"{web.url}/set", QUICK).sha256 == local.sha256  # a whole file needs none
    with pytest.raises(UserError, match="the server does not know range requests; copy the set"):
        epoch_of(remote)
    web.ranges, web.page = True, True
    with pytest.raises(DataError, match=r"dataset.json: an HTML page came instead"):
        open_dataset(f"{web.url}/set", QUICK)
    with pytest.raises(DataError, match=r"index.parquet: an HTML page came instead|tar: an HTML page came instead"):
        epoch_of(remote)
    web.page, web.folder = False, Path(local.folder)
    with pytest.raises(DataError, match=rf"{web.url}/set/.* is missing"):
        epoch_of(remote)
    web.folder, web.redirect = Path(local.folder).parent, web.url
    with pytest.raises(DataError, match="redirects without end"):
        epoch_of(remote)


def test_a_redirect_is_followed(local: Dataset, web: WebServer) -> None:
    with running_web(Path(local.folder)) as front:
        front.redirect = web.url
        assert open_dataset(f"{front.url}/set", QUICK).sha256 == local.sha256


def test_a_shorter_file_is_named(local: Dataset, tmp_path: Path) -> None:
    name = local.shards("train")[0].name
    for path in Path(local.folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: -1024 if path.name == name else None])
    with running_web(tmp_path.parent) as site:
        remote = open_dataset(f"{site.url}/{tmp_path.name}", QUICK)
        size = local.shards("train")[0].bytes
        with pytest.raises(DataError, match=rf"{name} is damaged: {size - 1024} bytes, {size} expected"):
            epoch_of(remote)


def test_a_certificate_that_is_not_trusted_is_named_and_can_be_trusted(
    local: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "own.pem"
    key = tmp_path / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with running_web(Path(local.folder).parent, context) as site:
        url = f"https://127.0.0.1:{site.port}"
        with pytest.raises(
            UserError, match=rf"{url}/set/dataset.json: the server's certificate is not trusted.*ca_bundle"
        ):
            open_dataset(f"{url}/set", QUICK)
        with pytest.raises(UserError, match=r"s3://b/set/.* the server's certificate is not trusted"):
            open_dataset("s3://b/set", dataclasses.replace(QUICK, endpoint_url=url))
        trusting = dataclasses.replace(QUICK, ca_bundle=str(certificate))
        assert open_dataset(f"{url}/set", trusting).sha256 == local.sha256
        with pytest.raises(UserError, match=r"no shard set at s3://b/set"):  # past the handshake: it is no S3 server
            open_dataset("s3://b/set", dataclasses.replace(trusting, endpoint_url=url))
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        assert open_dataset(f"{url}/set", QUICK).sha256 == local.sha256
