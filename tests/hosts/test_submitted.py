"""A run submitted from outside of the cluster, whose hosts share an S3 server and no disk, through the loss of each of its parts.

The figures of plain Ray Train were measured on such hosts with the same faults, on another day.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dying_runs import assert_same_bits
from hosts import API_URL, Hosts
from recovery import AT_STEP, Clock, host_with_a_worker
from s3_server import SECRET_KEY
from stored_runs import copied
from submitted import Outside

pytestmark = pytest.mark.ray

# What a client without the token, or with a wrong one, is told of each request; and whether it reaches the cluster otherwise.
_INTRUDER = f"""
import json, socket, sys, urllib3
told = []
for headers in ({{}}, {{"Authorization": "Bearer wrong-token"}}):
    pool = urllib3.PoolManager(headers=headers)
    for method, path in (("GET", "/api/jobs/"), ("POST", "/api/jobs/"), ("DELETE", "/api/jobs/whole"), ("GET", "/api/version"),
                         ("PUT", "/api/packages/gcs/x.zip"), ("GET", "/nodes?view=summary")):
        told.append(pool.request(method, {API_URL!r} + path, body=b"{{}}" if method == "POST" else None, retries=False).status)
reached = []
for port in (6379, 8265):
    try:
        socket.create_connection((sys.argv[1], port), timeout=5).close()
        reached.append(port)
    except OSError:
        pass
print(json.dumps([told, reached]))
"""


def _medtl(outside: Outside, *arguments: str) -> str:
    done = subprocess.run(
        outside.command(*arguments),
        env=outside.network.environment_outside(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_job_from_outside_that_loses_worker_node_driver_and_head_trains_the_weights_of_one_host(
    network: Hosts, outside: Outside, fixed: tuple[str, ...], undisturbed: Path, tmp_path: Path, clock: Clock
) -> None:
    intruder = subprocess.run(
        network.outside(sys.executable, "-c", _INTRUDER, network.hosts[0].ip),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(intruder.stdout) == [[401] * 6 + [403] * 6, []]
    plan = json.loads(_medtl(outside, *outside.arguments("whole", tmp_path / "out", fixed, "--dry-run")))
    assert plan["estimate"]["images"]["train"] == 98  # read from the store
    run = outside.train("whole", tmp_path / "out", fixed)
    run.wait_for_step(AT_STEP, 150)  # a wheel is built first, and a process of its own started for the job
    assert [len(network.workers_on(host)) for host in network.hosts[1:3]] == [1, 1]
    (victim,) = network.workers_on(host_with_a_worker(network))
    clock.start(run)
    os.kill(victim, signal.SIGKILL)
    clock.stop(run, "worker SIGKILL", "23")

    run.wait_for_step(AT_STEP + 12)
    clock.lose_a_node(network, run, "node power loss, replaced", "40")

    run.wait_for_step(AT_STEP + 24)
    clock.start(run)
    os.kill(network.driver(), signal.SIGKILL)
    code, errors = run.finish()
    assert code == 75, errors
    run = outside.train("whole", tmp_path / "out", fixed)
    clock.stop(run, "driver SIGKILL, submitted again")

    run.wait_for_step(AT_STEP + 36)
    clock.start(run)
    for host in network.hosts:  # a head takes its cluster with it: its nodes end by themselves within a minute
        network.power_off(host)
    for number in (0, 1, 2):
        network.power_on(network.hosts[number], cpus=min(number, 1))
    code, errors = run.finish()
    assert code == 75, errors
    assert "no longer knows whole.2: was the head replaced?" in errors
    run = outside.train("whole", tmp_path / "out", fixed)
    clock.stop(run, "head lost, cluster made anew, submitted again")
    code, errors = run.finish()
    assert code == 0, errors
    assert "the token travels unencrypted" in errors

    there = copied(run.folder, tmp_path / "copy")
    assert json.loads((there / "results.json").read_text())["training"]["world_size"] == 2
    assert_same_bits(undisturbed, there)
    for name in ("results.json", "report.html"):  # fetched outside
        assert (tmp_path / "out" / name).read_bytes() == (there / name).read_bytes()
    (row,) = json.loads(_medtl(outside, "list", "--json", *outside.address))
    assert (row["name"], row["state"], row["exit_code"]) == ("whole", "succeeded", 0)
    token = network.token_file.read_bytes()
    log = _medtl(outside, "logs", "whole", *outside.address).encode()
    seen = [path.read_bytes() for path in there.rglob("*") if path.is_file()]
    assert len(seen) > 10
    assert not any(secret in text for text in (log, *seen) for secret in (token, SECRET_KEY.encode()))
