"""A real cluster of two nodes on this machine, and clients outside it: submit, fetch, attach, refuse, look around, end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
from shard_sets import write_set

pytestmark = pytest.mark.ray


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "medtl_dist.cli.main", *map(str, arguments)]


def _medtl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments), capture_output=True, text=True, check=False, env=_environment(), timeout=300
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    log = (tmp_path_factory.mktemp("cluster") / "stderr").open("w+")
    process = subprocess.Popen(
        _command("cluster", "local", "--nodes", "2", "--json"),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=_environment(),
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    log.seek(0)
    if not line:
        process.wait(timeout=60)
        process.stdout.close()
        with log:
            pytest.fail(log.read())
    facts = json.loads(line)
    family = _descendants(process.pid)
    yield facts | {"family": family}
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    log.close()
    assert len(family) > 8
    left = [pid for pid in family if Path(f"/proc/{pid}/cmdline").exists() and b"ray" in _bytes(f"/proc/{pid}/cmdline")]
    assert left == []
    assert not Path(facts["token_file"]).parent.exists()


def _bytes(path: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(path).read_bytes()
    return b""


def _descendants(pid: int) -> list[int]:
    tasks = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for line in tasks for child in line]
    return children + [below for child in children for below in _descendants(child)]


def _where(cluster: dict[str, Any]) -> list[str]:
    return ["--address", cluster["address"], "--token-file", cluster["token_file"]]


def _submit(cluster: dict[str, Any], folder: Path, *more: str) -> list[str]:
    options = [f"data.shards={folder / 'set'}", "train.threads=1", "train.epochs=1", "cluster.num_workers=2", *more]
    settings = [part for option in options for part in ("--set", option)]
    return [
        "submit", "train", "--preset", "smoke", *settings, "--name", "tiny", "--store", str(folder / "store"), "--out",
        str(folder / "out"), *_where(cluster),
    ]  # fmt: skip


def test_two_clients_at_once_start_one_job_and_both_fetch_its_report(cluster: dict[str, Any], tmp_path: Path) -> None:
    write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]})
    clients = [
        subprocess.Popen(
            _command(*_submit(cluster, tmp_path)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        for _ in range(2)
    ]
    told = [client.communicate(timeout=300) for client in clients]
    assert [client.returncode for client in clients] == [0, 0], told
    assert sorted(error.splitlines()[0].split()[1] for _, error in told) == ["attached", "submitted"]
    run = tmp_path / "store" / "runs" / "tiny"
    for name in ("results.json", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (run / name).read_bytes()
    assert json.loads((run / "results.json").read_text())["training"]["world_size"] == 2

    again = _medtl(*_submit(cluster, tmp_path))
    assert again.returncode == 0
    assert again.stderr.startswith("tiny: finished as tiny;")
    other = _medtl(*_submit(cluster, tmp_path, "optim.lr=0.5"))
    assert other.returncode == 2
    assert "another config" in other.stderr

    rows = json.loads(_medtl("list", "--json", *_where(cluster)).stdout)
    assert [(row["name"], row["state"], row["exit_code"], row["attempt"]) for row in rows] == [
        ("tiny", "succeeded", 0, "tiny")
    ]
    assert "epoch 1: train loss" in _medtl("logs", "tiny", *_where(cluster)).stdout

    token = Path(cluster["token_file"]).read_text()
    session = Path(cluster["token_file"]).parent / "ray" / "session_latest"
    places = [path for folder in (run, session / "logs") for path in folder.rglob("*") if path.is_file()]
    assert len(places) > 20
    assert [path for path in places if token.encode() in path.read_bytes()] == []
    pool = urllib3.PoolManager(headers={"Authorization": f"Bearer {token}"})
    for path in ("/api/jobs/", "/api/jobs/tiny", "/api/jobs/tiny/logs"):
        answer = pool.request("GET", cluster["address"] + path)
        assert answer.status == 200
        assert token.encode() not in answer.data


@pytest.mark.parametrize(("headers", "status"), [({}, 401), ({"Authorization": "Bearer wrong-token"}, 403)])
def test_no_request_without_the_token_is_answered(
    cluster: dict[str, Any], headers: dict[str, str], status: int
) -> None:
    pool = urllib3.PoolManager(headers=headers)
    paths = [
        ("GET", "/api/version"), ("GET", "/api/jobs/"), ("POST", "/api/jobs/"), ("GET", "/api/jobs/tiny"),
        ("DELETE", "/api/jobs/tiny"), ("POST", "/api/jobs/tiny/stop"), ("GET", "/api/jobs/tiny/logs"),
        ("GET", "/api/jobs/tiny/logs/tail"), ("GET", "/api/packages/gcs/x.zip"), ("PUT", "/api/packages/gcs/x.zip"),
        ("GET", "/nodes?view=summary"), ("GET", "/api/v0/tasks"), ("GET", "/api/cluster_status"), ("GET", "/logical/actors"),
        ("GET", "/api/serve/applications/"), ("PUT", "/api/serve/applications/"), ("DELETE", "/api/serve/applications/"),
        ("GET", "/worker/traceback"), ("GET", "/api/v0/logs"),
    ]  # fmt: skip
    body = json.dumps({"entrypoint": "true", "submission_id": "intruder"}).encode()
    for method, path in paths:
        answer = pool.request(
            method, cluster["address"] + path, body=body if method in ("POST", "PUT") else None, retries=False
        )
        assert answer.status == status, (method, path)
    refused = _medtl("list", "--address", cluster["address"], "--token-file", os.devnull)
    assert refused.returncode == 2


def test_every_port_of_the_cluster_is_on_the_loopback(cluster: dict[str, Any]) -> None:
    inodes = set()
    for pid in cluster["family"]:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(descriptor).removeprefix("socket:[").rstrip("]"))
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    assert len(listening) > 6
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert set(listening) <= loopback


def test_the_doctor_looks_at_every_node(cluster: dict[str, Any], tmp_path: Path) -> None:
    write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]})
    (tmp_path / "store").mkdir()
    done = _medtl(
        "doctor", "--json", "--preset", "smoke", "--set", f"data.shards={tmp_path / 'set'}", "--store", tmp_path / "store",
        "--step", *_where(cluster),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    findings = {row["check"]: row for row in json.loads(done.stdout)["findings"]}
    assert {"authentication", "versions", "storage", "shards", "all-reduce", "clocks", "one step"} <= set(findings)
    assert all(row["state"] != "failed" for row in findings.values())
    assert "gloo between 2 nodes" in findings["all-reduce"]["text"]
    assert "from 2 places" in findings["storage"]["text"]
    assert list((tmp_path / "store").iterdir()) == []
