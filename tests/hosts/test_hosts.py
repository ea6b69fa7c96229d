"""Training over three hosts that lose workers, power, cables and their head: each time bit-equal to an undisturbed run.

Plain Ray Train, measured on such hosts for the same faults: worker SIGKILL 23 s, node loss with replacement 40 s, link down
113 s, drain 23 s.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from dying_runs import assert_same_bits
from hosts import Host, Hosts
from nodes import Command, tree, wait_for

pytestmark = pytest.mark.ray

_AT_STEP = 14


@pytest.fixture(autouse=True)
def _two_hosts(network: Hosts) -> None:
    """Hosts 1 and 2 are up and plugged in, 3 is off, whatever the test before did."""
    for host in network.hosts:
        network.plug(host, plugged=True)
    if network.hosts[0].node is None:
        network.power_on(network.hosts[0], cpus=0)
    for host in network.hosts[1:]:
        wanted = host is not network.hosts[3]
        if host.node is not None and (not wanted or network.node_id(host.name) is None):
            network.power_off(host)
        if host.node is None and wanted:
            network.power_on(host, cpus=1)


def _carried_on(run: Command, since: float, what: str, plain: str, capsys: pytest.CaptureFixture[str]) -> None:
    wait_for("resumption", lambda: any("resumed" in note for note in run.notes()), 200)
    with capsys.disabled():
        print(f"\n{what}: training again after {time.monotonic() - since:.0f} s (plain Ray Train: {plain})")


def _whole(run: Command, undisturbed: Path) -> None:
    code, errors = run.finish()
    assert code == 0, errors
    assert_same_bits(undisturbed, run.run_dir)


def _command_itself(run: Command) -> int:
    """The process that nsenter started."""
    return wait_for("the driver", lambda: next(iter(tree(run.process.pid)), None))


def _rank_1(network: Hosts, run: Command) -> Host:
    """A host with a worker and without the driver's controller: any of the two workers' will do."""
    run.wait_for_step(_AT_STEP)
    return max((host for host in network.hosts[1:] if network.workers_on(host)), key=lambda host: host.name)


def test_two_hosts_train_the_weights_of_one(
    network: Hosts, options: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    run = network.train_on(network.hosts[0], tmp_path / "run", *options)
    run.wait_for_step(4)
    assert [len(network.workers_on(host)) for host in network.hosts[1:3]] == [1, 1]
    _whole(run, undisturbed)


def test_a_worker_is_killed(
    network: Hosts, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = network.train_on(network.hosts[0], tmp_path / "run", *options)
    (victim,) = network.workers_on(_rank_1(network, run))
    os.kill(victim, signal.SIGKILL)
    _carried_on(run, time.monotonic(), "worker SIGKILL", "23 s", capsys)
    _whole(run, undisturbed)


def test_a_node_loses_power_and_is_replaced(
    network: Hosts, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = network.train_on(network.hosts[0], tmp_path / "run", *options)
    network.power_off(_rank_1(network, run))
    since = time.monotonic()
    network.power_on(network.hosts[3], cpus=1)
    _carried_on(run, since, "node power loss, replaced", "40 s", capsys)
    _whole(run, undisturbed)


def test_a_cable_is_cut_and_another_node_joins(
    network: Hosts, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = network.train_on(network.hosts[0], tmp_path / "run", *options)
    cut = _rank_1(network, run)
    network.plug(cut, plugged=False)
    since = time.monotonic()
    network.power_on(network.hosts[3], cpus=1)
    _carried_on(run, since, "link down, another node joins", "113 s", capsys)
    _whole(run, undisturbed)
    network.power_off(cut)


def test_a_node_is_drained_with_a_deadline(
    network: Hosts, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network.power_on(network.hosts[3], cpus=1)
    rare = "train.checkpoint_every_steps=50"  # what it goes on from was written on notice
    run = network.train_on(network.hosts[0], tmp_path / "run", *options, rare, "cluster.max_failures=0")
    wait_for("progress", (run.run_dir / "progress.json").exists)
    leaving = next(host for host in network.hosts[1:] if network.workers_on(host))
    network.drain(leaving.name, deadline_s=60)
    _carried_on(run, time.monotonic(), "drain with a deadline", "23 s", capsys)
    _whole(run, undisturbed)
    network.power_off(leaving)


def test_the_driver_is_killed_and_the_same_command_goes_on(
    network: Hosts, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = network.train_on(network.hosts[0], tmp_path / "run", *options)
    run.wait_for_step(_AT_STEP)
    os.kill(_command_itself(run), signal.SIGKILL)
    since = time.monotonic()
    run.process.communicate()
    again = network.train_on(network.hosts[0], tmp_path / "run", *options, resume=True)
    _carried_on(again, since, "driver SIGKILL, the same command again", "not measured", capsys)
    _whole(again, undisturbed)


def test_the_head_is_lost_and_the_same_command_goes_on(
    network: Hosts, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = network.train_on(network.hosts[0], tmp_path / "run", *options)
    run.wait_for_step(_AT_STEP)
    since = time.monotonic()
    for host in network.hosts[:3]:  # a head takes its cluster with it: its nodes end by themselves within a minute
        network.power_off(host)
    run.process.communicate()
    for number in (0, 1, 2):
        network.power_on(network.hosts[number], cpus=min(number, 1))
    again = network.train_on(network.hosts[0], tmp_path / "run", *options, resume=True)
    _carried_on(again, since, "head lost, cluster made anew, the same command again", "not measured", capsys)
    _whole(again, undisturbed)
