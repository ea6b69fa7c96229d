"""Processes that are killed or told to end, and the run that goes on from the last committed checkpoint, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from dying_runs import assert_same_bits
from nodes import Command, Machine, wait_for

pytestmark = pytest.mark.ray


def _newest(run: Command) -> int:
    return max((int(p.name) for p in run.run_dir.glob("checkpoints/*") if (p / "manifest.json").exists()), default=0)


def _recovered(run: Command, since: float, before: int, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wait until the run has got further than where it was, and print how long that took."""
    run.wait_for_step(before + 1)
    with capsys.disabled():
        print(f"\n{what}: training again after {time.monotonic() - since:.0f} s")


def test_a_worker_is_killed(
    cluster: Machine, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cluster.train(tmp_path / "run", *options)
    run.wait_for_step(14)
    victim = max(cluster.workers())
    os.kill(victim, signal.SIGKILL)
    since, before = time.monotonic(), _newest(run)
    _recovered(run, since, before + 2, "worker SIGKILL", capsys)
    code, errors = run.finish()
    assert code == 0, errors
    assert any("resumed" in note for note in run.notes())
    assert_same_bits(undisturbed, run.run_dir)


def test_a_worker_is_told_to_end(
    cluster: Machine, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cluster.train(tmp_path / "run", *options, "cluster.max_failures=0", "train.checkpoint_every_steps=50")
    wait_for("progress", (run.run_dir / "progress.json").exists)
    os.kill(max(cluster.workers()), signal.SIGTERM)
    since = time.monotonic()
    wait_for("resumption", lambda: any("resumed" in note for note in run.notes()))
    with capsys.disabled():
        print(f"\nworker SIGTERM: training again after {time.monotonic() - since:.0f} s")
    code, errors = run.finish()
    assert code == 0, errors
    assert_same_bits(undisturbed, run.run_dir)


def test_the_driver_is_told_to_end_and_the_same_command_goes_on(
    cluster: Machine, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rare = "train.checkpoint_every_steps=50"  # what there is of a checkpoint is of the notice
    run = cluster.train(tmp_path / "run", *options, rare)
    wait_for("progress", (run.run_dir / "progress.json").exists)
    run.process.send_signal(signal.SIGTERM)
    since = time.monotonic()
    code, errors = run.finish(timeout_s=30)
    assert code == 75, errors
    assert "stopped as asked in epoch" in errors
    with capsys.disabled():
        print(f"\ndriver SIGTERM: checkpoint and exit 75 after {time.monotonic() - since:.0f} s")
    assert wait_for("the end of the workers", lambda: not cluster.workers())
    since, before = time.monotonic(), _newest(run)
    assert before % 50
    again = cluster.train(run.run_dir, *options, rare, resume=True)
    _recovered(again, since, before, "the same command again", capsys)
    code, errors = again.finish()
    assert code == 0, errors
    assert_same_bits(undisturbed, run.run_dir)


def test_the_driver_is_killed_and_the_same_command_goes_on(
    cluster: Machine, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cluster.train(tmp_path / "run", *options)
    run.wait_for_step(14)
    run.process.kill()
    since = time.monotonic()
    run.process.communicate()
    again = cluster.train(run.run_dir, *options, resume=True)
    wait_for("the end of the first run's workers", lambda: not cluster.workers(), timeout_s=10)
    ended, before = time.monotonic() - since, _newest(run)
    _recovered(again, since, before, f"driver SIGKILL: its workers were gone after {ended:.1f} s", capsys)
    code, errors = again.finish()
    assert code == 0, errors
    assert_same_bits(undisturbed, run.run_dir)
