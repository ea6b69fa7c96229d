"""Runs submitted from outside over hosts that are drained, lose a cable, or power where the run may shrink; all storage S3.

The figures of plain Ray Train were measured on such hosts with the same faults, on another day.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dying_runs import assert_same_bits, assert_same_samples
from hosts import Hosts
from nodes import wait_for
from recovery import AT_STEP, Clock, host_with_a_worker
from stored_runs import copied
from submitted import Outside

pytestmark = pytest.mark.ray


def test_a_node_is_drained_then_the_cable_of_another_is_cut(
    network: Hosts, outside: Outside, fixed: tuple[str, ...], undisturbed: Path, tmp_path: Path, clock: Clock
) -> None:
    network.power_on(network.hosts[3], cpus=1)
    # What the drained one goes on from was written on notice, and it costs no retry: the cable has the only one.
    rare = ("train.checkpoint_every_steps=50", "cluster.max_failures=1")
    run = outside.train("drained", tmp_path / "out", (*fixed, *rare))
    wait_for("training", lambda: run.notes() or None, 150, run.look_every_s)
    leaving = next(host for host in network.hosts[1:] if network.workers_on(host))
    clock.start(run)
    network.drain(leaving.name, deadline_s=60)
    clock.stop(run, "drain with a deadline", "23")

    network.power_off(leaving)
    run.wait_for_step(36)  # an epoch's end
    cut = host_with_a_worker(network)
    clock.start(run)
    network.plug(cut, plugged=False)
    network.power_on(leaving, cpus=1)
    clock.stop(run, "link down, another node joins", "113")
    code, errors = run.finish()
    assert code == 0, errors
    assert_same_bits(undisturbed, copied(run.folder, tmp_path / "copy"))
    network.power_off(cut)


def test_a_node_loses_power_and_a_run_that_may_shrink_goes_on_with_one_worker(
    network: Hosts, outside: Outside, fixed: tuple[str, ...], undisturbed: Path, tmp_path: Path, clock: Clock
) -> None:
    elastic = ("cluster.min_workers=1", "cluster.max_failures=3")
    run = outside.train("elastic", tmp_path / "out", (*fixed, *elastic))
    run.wait_for_step(AT_STEP)
    clock.start(run)
    network.power_off(host_with_a_worker(network))
    clock.stop(run, "node power loss, elastic from two workers to one", "98")
    code, errors = run.finish()
    assert code == 0, errors
    there = copied(run.folder, tmp_path / "copy")
    assert json.loads((there / "results.json").read_text())["training"]["world_size"] == 1
    assert_same_samples(undisturbed, there)
