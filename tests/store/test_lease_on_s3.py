"""Leases and fences on a real S3 server: one writer, and a writer that lost its lease harms nobody."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from typing import Any

import pytest
import torch
from lease_racer import race
from s3_server import BUCKET, S3Server

from medtl_dist import create_only
from medtl_dist.cli.main import run
from medtl_dist.errors import Interrupted, UserError
from medtl_dist.storage import StorageOptions
from medtl_dist.store_folder import StoreFolder, store_folder
from medtl_dist.train import checkpoint
from medtl_dist.train.lease import fenced, held_lease
from medtl_dist.train.orphans import found_orphans

pytestmark = pytest.mark.store


@pytest.fixture
def store(address: str, s3: S3Server) -> StoreFolder:
    return store_folder(address, StorageOptions(endpoint_url=s3.url, timeout_s=10))


def test_of_processes_at_once_one_gets_the_lease(store: StoreFolder, s3: S3Server) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    racers = [context.Process(target=race, args=(store.url, s3.url, time.time() + 5, queue)) for _ in range(4)]
    for racer in racers:
        racer.start()
    found = [queue.get(timeout=90) for _ in racers]
    for racer in racers:
        racer.join(30)
    assert sorted(x for x in found if isinstance(x, int)) in (
        [1],
        [1, 2],
    )  # a late starter may come after the first's end
    assert all("racer is writing in this run folder" in x for x in found if isinstance(x, str))
    assert [name for name in store.names(".lease") if not name.isdigit()] == []


def test_a_store_that_ignores_the_condition_is_refused(store: StoreFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create_only, "_create_in_store", lambda folder, name, data: folder.put(name, data) or True)
    with pytest.raises(UserError, match="ignores If-None-Match"), held_lease(store, owner="a", ttl_s=60):
        raise AssertionError
    assert store.names(".lease") == []


def test_a_lost_answer_does_not_lose_the_lease(store: StoreFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medtl_dist.create_only.time.sleep", lambda seconds: None)
    client, exceptions = create_only.client_of((), BUCKET, store.options)
    lost: list[str] = []

    class LosesFirstAnswers:
        def put_object(self, Key: str, **arguments: Any) -> None:
            with contextlib.suppress(exceptions.ClientError):
                client.put_object(Key=Key, **arguments)
                if Key in lost:
                    return
            if Key not in lost:
                lost.append(Key)
                raise exceptions.ConnectionClosedError(endpoint_url="")
            client.put_object(Key=Key, **arguments)

    monkeypatch.setattr(create_only, "client_of", lambda *made_for: (LosesFirstAnswers(), exceptions))
    assert create_only.create(store, "1", b"mine")  # the server had made it
    store.write("2", b"another's")
    assert not create_only.create(store, "2", b"mine")
    assert store.read("2") == b"another's"
    assert len(lost) == 2


def save(folder: StoreFolder, step: int, value: float) -> None:
    checkpoint.save(folder, step, weights={"w": torch.full((2,), value)}, state={}, meta={})


def test_a_writer_that_lost_its_lease_neither_commits_nor_harms_its_successor(store: StoreFolder) -> None:
    with held_lease(store, owner="old", ttl_s=0.5) as first:
        old = fenced(store, first.fence)
        save(old, 1, 1.0)
    with held_lease(store, owner="new", ttl_s=60) as second:
        new = fenced(store, second.fence)
        assert (first.fence, second.fence) == (1, 2)
        assert checkpoint.latest(new, print) == 1
        save(new, 3, 2.0)
        for act in (lambda: save(old, 4, -1.0), first.check):
            with pytest.raises(Interrupted, match="another process has taken over this run"):
                act()
        # What it had under way when it lost the lease may still arrive.
        late = store_folder(store.url, store.options)
        object.__setattr__(late, "fence", first.fence)
        for step in (3, 9):
            save(late, step, -1.0)
        assert checkpoint.latest(new, print) == 3
        assert checkpoint.load(new, 3)[0]["w"].tolist() == [2.0, 2.0]
        checkpoint.retain(late, best=None, newest=1)
        assert "00000003-000002" in store.names("checkpoints")
        checkpoint.retain(new, best=1, newest=3)
        assert checkpoint.steps(new) == [1, 3]
        # One that lists 9 as damaged or absent goes on from the newest fence, and loads what that wrote.
        save(late, 12, -1.0)
        assert checkpoint.latest(store, print) == 3


def test_a_run_is_refused_while_another_writes_and_cleaned_only_afterwards(
    store: StoreFolder, s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    store.write("config.yaml", b"data: {}\n")
    store.write("checkpoints/00000004-000001/model.safetensors", b"12345")
    save(store, 3, 1.0)
    client, _ = create_only.client_of((), BUCKET, store.options)
    begun = client.create_multipart_upload(Bucket=BUCKET, Key=store.at("checkpoints/x").removeprefix(f"{BUCKET}/"))
    client.upload_part(Bucket=BUCKET, Key=begun["Key"], UploadId=begun["UploadId"], PartNumber=1, Body=b"x")
    with held_lease(store, owner="process 1 on a", ttl_s=60):
        with pytest.raises(UserError, match="process 1 on a is writing"), found_orphans(store, "me"):
            raise AssertionError
        assert run(["status", store.url]) == 0
        assert "set: running" in capsys.readouterr().out
    assert run(["runs", "clean", store.url, "--yes"]) == 0
    said = capsys.readouterr().out
    assert "checkpoints/00000004-000001/  checkpoint never completed" in said
    assert "checkpoints/x  unfinished upload" in said
    assert checkpoint.steps(store) == [3]
    assert create_only.unfinished_uploads(store) == []
    assert run(["runs", "clean", store.url]) == 0
    assert capsys.readouterr().out == "0 orphans, 0.0 MiB, found\n"
