"""Training over three hosts that lose workers, power, cables and their head: each time bit-equal to an undisturbed run.

The figures of plain Ray Train were measured on such hosts with the same faults, on another day.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from dying_runs import assert_same_bits, assert_same_samples
from hosts import Hosts
from nodes import Command, tree, wait_for
from recovery import AT_STEP, Clock, host_with_a_worker

pytestmark = pytest.mark.ray


def _command_itself(run: Command) -> int:
    """The process that nsenter started."""
    return wait_for("the driver", lambda: next(iter(tree(run.process.pid)), None))


def test_a_worker_then_the_driver_then_the_head_are_lost(
    network: Hosts, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, clock: Clock
) -> None:
    run = network.train_on(network.hosts[0], tmp_path / "run", *options)
    run.wait_for_step(AT_STEP)
    (victim,) = network.workers_on(host_with_a_worker(network))
    clock.start(run)
    os.kill(victim, signal.SIGKILL)
    clock.stop(run, "worker SIGKILL", "23")

    run.wait_for_step(AT_STEP + 12)
    clock.start(run)
    os.kill(_command_itself(run), signal.SIGKILL)
    run.process.communicate()
    run = network.train_on(network.hosts[0], tmp_path / "run", *options, resume=True)
    clock.stop(run, "driver SIGKILL, the same command again")

    run.wait_for_step(AT_STEP + 24)
    clock.start(run)
    for host in network.hosts[:3]:  # a head takes its cluster with it: its nodes end by themselves within a minute
        network.power_off(host)
    run.process.communicate()
    for number in (0, 1, 2):
        network.power_on(network.hosts[number], cpus=min(number, 1))
    run = network.train_on(network.hosts[0], tmp_path / "run", *options, resume=True)
    clock.stop(run, "head lost, cluster made anew, the same command again")
    code, errors = run.finish()
    assert code == 0, errors
    assert_same_bits(undisturbed, run.run_dir)


def test_a_node_is_drained_then_the_cable_of_another_is_cut(
    network: Hosts, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, clock: Clock
) -> None:
    network.power_on(network.hosts[3], cpus=1)
    # What the drained one goes on from was written on notice, and it costs no retry: the cable has the only one.
    rare = ("train.checkpoint_every_steps=50", "cluster.max_failures=1")
    run = network.train_on(network.hosts[0], tmp_path / "run", *options, *rare)
    wait_for("progress", (run.run_dir / "progress.json").exists)
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
    assert_same_bits(undisturbed, run.run_dir)
    network.power_off(cut)


def test_a_node_loses_power_and_a_run_that_may_shrink_goes_on_with_one_worker(
    network: Hosts, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, clock: Clock
) -> None:
    elastic = ("cluster.min_workers=1", "cluster.max_failures=3")
    run = network.train_on(network.hosts[0], tmp_path / "run", *options, *elastic)
    run.wait_for_step(AT_STEP)
    clock.start(run)
    network.power_off(host_with_a_worker(network))
    clock.stop(run, "node power loss, elastic from two workers to one", "98")
    code, errors = run.finish()
    assert code == 0, errors
    assert json.loads((run.run_dir / "results.json").read_text())["training"]["world_size"] == 1
    assert_same_samples(undisturbed, run.run_dir)
