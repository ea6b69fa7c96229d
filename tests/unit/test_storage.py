"""Places, what is refused, what is said of a store's errors (storage.py)."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.errors import DataError, MedtlError, UserError
from medtl_dist.storage import (
    Folder,
    Place,
    StorageOptions,
    Transient,
    bounded,
    classify,
    filesystem,
    is_remote,
    parse_place,
    redact,
)

SECRET = "hunter2-canary"


@pytest.mark.parametrize(
    ("text", "scheme", "url"),
    [
        ("/data/set", "file", "/data/set"),
        ("/data/a: b #1", "file", "/data/a: b #1"),
        ("file:///data/my%20set", "file", "/data/my set"),
        ("s3://bucket/a/b/", "s3", "s3://bucket/a/b"),
        ("S3://bucket", "s3", "s3://bucket"),
        ("gs://bucket/a", "gs", "gs://bucket/a"),
        ("https://host:8443/sets/x", "https", "https://host:8443/sets/x"),
        ("http://host/x", "http", "http://host/x"),
    ],
)
def test_places(text: str, scheme: str, url: str) -> None:
    place = parse_place(text)
    assert (place.scheme, place.url) == (scheme, url)
    assert place.remote == is_remote(text) == (scheme != "file")
    assert parse_place(place.url) == place


def test_a_path_becomes_absolute_and_a_path_object_is_never_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_place("sets/x").url == str(tmp_path / "sets/x")
    assert parse_place("./a:b").url == str(tmp_path / "a:b")
    assert parse_place(Path("s3:/b")).url == str(tmp_path / "s3:/b")
    assert Place("s3", "s3://bucket/a/b").path == "bucket/a/b"
    assert Place("s3", "s3://bucket/a/b").name == "b"


@pytest.mark.parametrize(
    "text",
    [
        "pipe:cat /etc/passwd", "pipe://cat", "ftp://host/x", "file+pipe://x", "hdfs://x/y", "s3:bucket/x", "data:,x",
        "javascript:alert(1)", "gopher://x", "http:/host/x",
    ],
)  # fmt: skip
def test_a_scheme_that_is_not_on_the_list_is_refused(text: str) -> None:
    with pytest.raises(
        UserError, match="is no kind of place that can be read; expected a path or one of file://, s3://"
    ):
        parse_place(text)


@pytest.mark.parametrize(
    "text", ["s3://", "s3:///x", "http://", "s3://b/../c", "s3://b/a//c", "https://h/./x", "file://host/x"]
)
def test_an_address_that_makes_no_sense(text: str) -> None:
    with pytest.raises(UserError, match=r"expected an address like|is file:///absolute/path"):
        parse_place(text)


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@host/set", f"s3://AKID:{SECRET}@bucket/set", f"https://host/set?X-Amz-Signature={SECRET}",
        f"gs://bucket/set#{SECRET}",
    ],
)  # fmt: skip
def test_credentials_in_an_address_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UserError, match="must hold no user, password, query or signature") as caught:
        parse_place(text)
    assert SECRET not in caught.value.message
    with pytest.raises(UserError) as caught:
        _ = StorageOptions(endpoint_url=f"https://u:{SECRET}@host").endpoint
    assert SECRET not in caught.value.message


@given(st.text("abc@:/?#&=%.", min_size=0, max_size=30), st.text("xyz:", max_size=8))
@settings(max_examples=50, deadline=None)
def test_nothing_secret_is_left_by_redaction(rest: str, user: str) -> None:
    """Whatever stands before an @ of the host, or behind ? and #."""
    for url in (f"https://{user}{SECRET}@host/{rest}", f"s3://host/a?{SECRET}{rest}", f"s3://host/a#{rest}{SECRET}"):
        assert SECRET not in redact(url)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 56, Failure when receiving data from the peer; D",
         Transient, "failure when receiving data from the peer"),
        ("AWS Error SLOW_DOWN during GetObject operation: Please reduce", Transient, "slow down"),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.", Transient, "HTTP 503"),
        ("AWS Error ACCESS_DENIED during HeadObject operation: No", UserError, "access refused (access denied)"),
        ("AWS Error UNKNOWN (HTTP status 403) during X", UserError, "access refused"),
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during X", UserError, "access refused (signature does not match)"),
        ("AWS Error UNKNOWN (HTTP status 400) during X", UserError, "refuses this request (HTTP 400)"),
        ("AWS Error NETWORK_CONNECTION during X: curlCode: 60, SSL peer certificate was not OK; D", UserError, "data.ca_bundle"),
        ("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: x", DataError, "is missing"),
        ("google::cloud::Status(PERMISSION_DENIED: Permanent error)", UserError, "access refused (permission denied)"),
        ("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)", Transient, "unavailable"),
        (f"something with {SECRET}", Transient, "OSError"),
    ],
)  # fmt: skip
def test_what_a_stores_error_means(text: str, kind: type, said: str) -> None:
    found = classify(OSError(text), "s3://bucket/x")
    assert isinstance(found, kind)
    assert said in str(found)
    assert SECRET not in str(found)
    if isinstance(found, MedtlError):
        assert found.message.startswith("s3://bucket/x")
    assert isinstance(classify(FileNotFoundError(2, "x"), "u"), DataError)


def test_the_endpoint_and_the_authorities_come_from_options_then_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert (StorageOptions().endpoint, StorageOptions().authorities) == (None, None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one:1/")
    assert StorageOptions().endpoint == "http://one:1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://two:2")
    assert StorageOptions().endpoint == "http://two:2"
    assert StorageOptions(endpoint_url="https://three").endpoint == "https://three"
    with pytest.raises(UserError, match="expected an address like https://minio"):
        _ = StorageOptions(endpoint_url="minio:9000").endpoint
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(UserError, match=r"CA bundle .*none.pem: no such file"):
        _ = StorageOptions().authorities
    (tmp_path / "ca.pem").touch()
    assert StorageOptions(ca_bundle=str(tmp_path / "ca.pem")).authorities == str(tmp_path / "ca.pem")
    assert pickle.loads(pickle.dumps(StorageOptions(retries=1))) == StorageOptions(retries=1)  # noqa: S301 - our own


def test_connections_are_kept_until_the_environment_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "one")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    place = parse_place("s3://bucket/x")
    first = filesystem(place, StorageOptions())
    assert filesystem(place, StorageOptions()) is first
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "two")
    assert filesystem(place, StorageOptions()) is not first
    with pytest.raises(UserError, match="a web server can only be read from"):
        filesystem(parse_place("https://h/x"), StorageOptions())


def test_a_folder_by_path_and_by_address(tmp_path: Path) -> None:
    folder = Folder.at_url(f"file://{tmp_path}/a")
    assert folder == Folder.local(tmp_path / "a")
    folder.write("b/c.tar.gz", b"not compressed")
    assert folder.read("b/c.tar.gz") == b"not compressed"  # the name does not decide what is done with the bytes
    assert (tmp_path / "a/b/c.tar.gz").read_bytes() == b"not compressed"
    assert (folder.names(), folder.names("b"), folder.names("none")) == (["b"], ["c.tar.gz"], [])
    folder.delete("b/c.tar.gz")
    folder.delete("b/c.tar.gz")
    assert folder.names("b") == []
    with pytest.raises(DataError, match="can't be read"):
        folder.read("none")


def test_a_call_that_hangs_is_given_up_and_does_not_keep_the_process() -> None:
    go_on = threading.Event()
    begun = time.monotonic()
    with pytest.raises(Transient, match="no answer within 0 s"):
        bounded(lambda: go_on.wait(20), 0.05)
    assert time.monotonic() - begun < 10
    go_on.set()
    assert bounded(lambda: 3, 5) == 3
    with pytest.raises(KeyError):
        bounded(lambda: {}[1], 5)
    # An exit handler waits, as Arrow's clean-up does, for a call that never ends.
    code = (
        "import atexit, threading; from medtl_dist import storage; atexit.register(threading.Event().wait)\n"
        "try: storage.bounded(threading.Event().wait, 0.05)\n"
        "except storage.Transient: print('given up')\n"
        "storage.leave(75)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (75, "given up\n", "")


def test_a_thread_that_was_given_up_is_not_waited_for_and_the_exit_code_stays() -> None:
    code = (
        "import threading; from medtl_dist import storage;"
        "t = threading.Thread(target=threading.Event().wait); t.start(); storage.given_up(t); storage.leave(75)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 75
