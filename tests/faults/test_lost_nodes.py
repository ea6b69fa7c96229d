"""Nodes that are lost or will be: the run goes on with what is left, or elsewhere, or ends with 75 and can be run again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dying_runs import assert_same_bits, assert_same_samples
from nodes import Machine, machine, tree, wait_for

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A head that holds no workers; each test adds its nodes, and loses some."""
    # Not below tmp_path, which has the test's name in it: Ray's sockets lie there, and their paths are 107 bytes at most.
    with machine(tmp_path_factory.mktemp("ray")) as started:
        started.start_head(cpus=0)
        yield started


def test_a_node_is_lost_and_an_elastic_run_goes_on_with_fewer_workers(
    cluster: Machine, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.start_node(1, "first")
    lost = cluster.start_node(1, "second")
    run = cluster.train(tmp_path / "run", *options, "cluster.min_workers=1", "cluster.max_failures=3")
    run.wait_for_step(14)
    assert len(cluster.workers()) == 2
    cluster.kill_node(lost)
    since = time.monotonic()
    wait_for("resumption", lambda: any("resumed" in note for note in run.notes()), 120)
    with capsys.disabled():
        print(f"\nnode loss, elastic 2 to 1: training again after {time.monotonic() - since:.0f} s")
    code, errors = run.finish()
    assert code == 0, errors
    results = json.loads((run.run_dir / "results.json").read_text())
    assert results["training"]["world_size"] == 1
    assert_same_samples(undisturbed, run.run_dir)


def test_a_node_is_drained_and_the_run_goes_on_elsewhere(
    cluster: Machine, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = {name: cluster.start_node(2, name) for name in ("first", "second")}
    run = cluster.train(tmp_path / "run", *options, "train.checkpoint_every_steps=50", "cluster.max_failures=0")
    wait_for("progress", (run.run_dir / "progress.json").exists)
    (ours,) = [name for name, node in nodes.items() if set(cluster.workers()) & set(tree(node.pid))]
    cluster.drain(ours, deadline_s=60)
    since = time.monotonic()
    wait_for("resumption", lambda: any("resumed" in note for note in run.notes()), 120)
    with capsys.disabled():
        print(f"\nnode drained: training again elsewhere after {time.monotonic() - since:.0f} s")
    code, errors = run.finish()
    assert code == 0, errors
    assert_same_bits(undisturbed, run.run_dir)


def test_a_node_is_drained_and_there_is_no_other(
    cluster: Machine, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.start_node(2, "first")
    run = cluster.train(tmp_path / "run", *options, "train.checkpoint_every_steps=50", "cluster.wait_for_workers_s=0")
    wait_for("progress", (run.run_dir / "progress.json").exists)
    cluster.drain("first", deadline_s=60)
    since = time.monotonic()
    code, errors = run.finish()
    assert code == 75, errors
    assert "room for 0 workers (1 CPU each), and 2 are needed" in errors
    with capsys.disabled():
        print(f"\nnode drained, no other: checkpoint and exit 75 after {time.monotonic() - since:.0f} s")
    cluster.start_node(2, "second")
    again = cluster.train(run.run_dir, *options, "train.checkpoint_every_steps=50", resume=True)
    code, errors = again.finish()
    assert code == 0, errors
    assert_same_bits(undisturbed, run.run_dir)
