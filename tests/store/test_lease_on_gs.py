"""Leases in Google's storage: one writer at a time, by uploads that are conditional on there being no such object.

Against the emulator with the condition added (``gs_emulator``), and with it left out. Google's own servers were not asked.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import urllib3
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gs_server import running_emulator
from lease_racer import race

from medtl_dist import create_only
from medtl_dist.cli.main import run
from medtl_dist.data.shards import Dataset
from medtl_dist.errors import Interrupted, UserError
from medtl_dist.storage import EMULATOR, StorageOptions
from medtl_dist.store_folder import StoreFolder, store_folder
from medtl_dist.train.lease import fenced, held_lease
from medtl_dist.train.orphans import found_orphans

pytestmark = pytest.mark.store
OPTIONS = StorageOptions(timeout_s=5.0, retries=1)
_made_for = itertools.count()  # an environment of its own for each test


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_emulator(tmp_path_factory.mktemp("gs")) as url:
        yield url


@pytest.fixture
def store(emulator: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> StoreFolder:
    monkeypatch.setenv(EMULATOR, emulator)
    monkeypatch.setattr(create_only, "time", SimpleNamespace(sleep=lambda seconds: None))  # its own pauses alone
    return store_folder(f"gs://sets/{request.node.name[:30]}/a run+1", OPTIONS)


def test_of_processes_at_once_one_gets_the_lease(store: StoreFolder) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    racers = [context.Process(target=race, args=(store.url, "", time.time() + 5, queue)) for _ in range(3)]
    for racer in racers:
        racer.start()
    found = [queue.get(timeout=90) for _ in racers]
    for racer in racers:
        racer.join(30)
    # A late starter may come after the first's end.
    assert sorted(x for x in found if isinstance(x, int)) in ([1], [1, 2])
    assert all("racer is writing in this run folder" in x for x in found if isinstance(x, str))
    assert [name for name in store.names(".lease") if not name.isdigit()] == []


def test_what_is_there_already_is_another_ones_whatever_it_says(store: StoreFolder) -> None:
    assert create_only.create(store, "mine", b"the same") is True
    assert create_only.create(store, "mine", b"the same") is False


def test_a_store_that_ignores_the_condition_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_emulator(tmp_path, "ignore") as url:
        monkeypatch.setenv(EMULATOR, url)
        store = store_folder("gs://sets/run", OPTIONS)
        with pytest.raises(UserError, match="ignores ifGenerationMatch"), held_lease(store, owner="a", ttl_s=60):
            raise AssertionError
        assert store.names(".lease") == []


def test_a_writer_that_lost_its_lease_writes_nothing_more(store: StoreFolder) -> None:
    with held_lease(store, owner="old", ttl_s=60) as first:
        old = fenced(store, first.fence)
        old.write("x", b"old")
    with held_lease(store, owner="process 1 on a", ttl_s=60) as second:
        assert (first.fence, second.fence) == (1, 2)
        with pytest.raises(Interrupted, match="another process has taken over this run"):
            fenced(store, first.fence).write("x", b"late")
        assert store.read("x") == b"old"
        store.write("config.yaml", b"data: {}")
        with pytest.raises(UserError, match="process 1 on a is writing"), found_orphans(store, "me"):
            raise AssertionError
    with found_orphans(store, "me") as orphans:
        assert orphans == []


class Pool:
    """Connections to the emulator that lose the answers to the first upload of each object, or answer ``status`` themselves."""

    def __init__(self, status: int | None = None) -> None:
        self.real, self.status = urllib3.PoolManager(), status
        self.seen: list[str] = []
        self.headers: list[dict[str, str]] = []

    def request(self, method: str, url: str, *, headers: dict[str, str], **rest: Any) -> Any:
        again = url in self.seen
        self.seen.append(url)
        self.headers.append(headers)
        if self.status is not None:
            return SimpleNamespace(status=self.status)
        answer = self.real.request(method, url, headers=headers, **rest)
        if again:
            return answer
        raise urllib3.exceptions.ProtocolError("the connection was closed")


class Credentials:
    """What google-auth does before a request, failing first as told."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)

    def before_request(self, request: Any, method: str, url: str, headers: dict[str, str]) -> None:
        if self.failures:
            raise self.failures.pop(0)
        headers["authorization"] = "Bearer TOKEN"


def google(monkeypatch: pytest.MonkeyPatch, pool: Pool, credentials: Credentials | None) -> None:
    failures = create_only._Failures(ConnectionError, PermissionError, None)
    monkeypatch.setattr(create_only, "_google", lambda *made_for: (pool, credentials, failures))


def test_a_lost_answer_does_not_lose_the_lease(store: StoreFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    google(monkeypatch, pool, None)
    assert create_only.create(store, "1", b"mine")  # the server had made it
    store.write("2", b"another's")
    assert not create_only.create(store, "2", b"mine")
    assert (store.read("1"), store.read("2")) == (b"mine", b"another's")
    assert len(pool.seen) == 4


def test_each_try_goes_with_a_token(store: StoreFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    google(monkeypatch, pool, Credentials(ConnectionError("no metadata server yet")))
    assert create_only.create(store, "1", b"mine")
    assert [headers["authorization"] for headers in pool.headers] == ["Bearer TOKEN"] * 2
    google(monkeypatch, pool, Credentials(PermissionError("revoked")))
    with pytest.raises(UserError, match=r"access refused .*GOOGLE_APPLICATION_CREDENTIALS") as caught:
        create_only.create(store, "2", b"mine")
    assert "TOKEN" not in caught.value.message


class TokenServer(BaseHTTPRequestHandler):
    """Where google-auth fetches a service account's token, or is refused one."""

    code = 200

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = b'{"access_token": "TOKEN", "expires_in": 3600}'
        self.send_response(type(self).code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def test_google_auth_is_asked_as_it_wants_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself, with a service account's file whose tokens come from here, are refused, or can't be asked for."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    monkeypatch.delenv(EMULATOR, raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))

    def asked() -> dict[str, str]:
        _, credentials, failures = create_only._google((next(_made_for),), 3.0)
        headers: dict[str, str] = {}
        try:
            credentials.before_request(failures.request, "POST", "https://storage.googleapis.com/x", headers)
        except failures.transport:
            raise ConnectionError from None
        except failures.refresh:
            raise PermissionError from None
        return headers

    with ThreadingHTTPServer(("127.0.0.1", 0), TokenServer) as server:
        account = {
            "type": "service_account",
            "client_email": "medtl@project.iam.gserviceaccount.com",
            "private_key": key.decode(),
            "private_key_id": "1",
            "token_uri": f"http://127.0.0.1:{server.server_port}/token",
        }
        (tmp_path / "account.json").write_text(json.dumps(account))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert asked()["authorization"] == "Bearer TOKEN"
        monkeypatch.setattr(TokenServer, "code", 400)
        with pytest.raises(PermissionError):
            asked()
        server.shutdown()
    with pytest.raises(ConnectionError):
        asked()


@pytest.mark.parametrize(
    ("status", "error", "message", "tries"),
    [
        (401, UserError, "access refused .HTTP 401.*gcloud", 1),
        (403, UserError, "access refused .HTTP 403", 1),
        (404, UserError, "no such bucket", 1),
        (429, Interrupted, "HTTP 429; 6 tries", 6),
        (503, Interrupted, "HTTP 503; 6 tries", 6),
    ],
)
def test_a_refusal_is_told_and_an_outage_waited_out(
    status: int, error: type[Exception], message: str, tries: int, store: StoreFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(status)
    google(monkeypatch, pool, None)
    with pytest.raises(error, match=message):
        create_only.create(store, "1", b"mine")
    assert len(pool.seen) == tries


def test_without_credentials_the_ways_to_give_them_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EMULATOR, raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"access refused .no credentials found.*GOOGLE_APPLICATION_CREDENTIALS"):
        create_only._google((next(_made_for),), 1.0)


def test_a_run_folder_in_googles_storage_has_one_writer(
    local: Dataset, store: StoreFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = [f"data.shards={local.folder}", "train.threads=1", "train.epochs=1", "data.loader_workers=0"]
    place = store.place.url.replace(" ", "-").replace("+", "-")
    command = ["train", "--preset", "smoke", *(word for choice in choices for word in ("--set", choice))]
    command += ["--run-dir", place, "--resume"]
    with held_lease(store_folder(place, OPTIONS), owner="process 1 on a", ttl_s=0.5) as lease:
        lease.renew()
        assert run(command) == 2
        assert "process 1 on a is writing in this run folder" in capsys.readouterr().err
    assert run(command) == 0
    capsys.readouterr()
    assert run(["status", place, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], len(facts["epochs"])) == ("finished", 1)
    there = store_folder(place, OPTIONS)
    assert json.loads(there.read(f"checkpoints/{there.names('checkpoints')[-1]}/manifest.json"))["fence"] == 2
    assert run(["runs", "clean", place]) == 0
    assert "0 orphans" in capsys.readouterr().out
