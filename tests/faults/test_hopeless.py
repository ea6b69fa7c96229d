"""What a restart would not mend, made to happen for real on a cluster: told once, on every rank, without a retry."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dying_runs import assert_same_bits
from nodes import Command, Machine

from medtl_dist.data.shards import open_dataset, read_split

pytestmark = pytest.mark.ray


def _attempts(run: Command) -> int:
    """How often workers began: each says where its weights are from."""
    return sum("random initial weights" in note or "resumed at" in note for note in run.notes())


def _told(run: Command, code: int, errors: str, what: str, since: float, capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    with capsys.disabled():
        print(f"\n{what}: told after {time.monotonic() - since:.0f} s from the start, exit {code}")
    return lines[0]


@contextlib.contextmanager
def _small_disk(folder: Path, kib: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a worker may not have ended yet


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk: needs root")
def test_a_full_disk(
    cluster: Machine, options: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _small_disk(tmp_path / "disk", 16 * 1024):
        ballast = tmp_path / "disk" / "ballast"  # with it there is room for the first checkpoint and not for the third
        ballast.write_bytes(bytes(6 * 1024 * 1024))
        since, run = time.monotonic(), cluster.train(tmp_path / "disk" / "run", *options, "cluster.max_failures=3")
        code, errors = run.finish()
        assert code == 5, errors
        line = _told(run, code, errors, "disk full", since, capsys)
        assert "No space left on device" in line
        assert "--resume goes on" in line
        assert _attempts(run) == 1
        assert run.reached(2)
        ballast.unlink()
        again = cluster.train(run.run_dir, *options, "cluster.max_failures=3", resume=True)
        code, errors = again.finish()
        assert code == 0, errors
        assert_same_bits(undisturbed, run.run_dir)


def test_a_loss_that_stays_not_finite(
    cluster: Machine, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    since, run = time.monotonic(), cluster.train(tmp_path / "run", *options, "optim.lr=1e30")
    code, errors = run.finish()
    assert code == 5, errors
    line = _told(run, code, errors, "NaN", since, capsys)
    assert "3 steps in a row, the last one epoch 0, step" in line
    assert _attempts(run) == 1
    assert sum("left out" in note for note in run.notes()) == 3


def test_one_ranks_bad_image(
    cluster: Machine, options: tuple[str, ...], shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["cp", "-r", shards, str(tmp_path / "set")], check=True)
    row = read_split(open_dataset(shards), "train", columns=["key", "shard", "offset", "size"]).to_pylist()[50]
    with (tmp_path / "set" / row["shard"]).open("r+b") as tar:
        tar.seek(row["offset"] + row["size"] // 2)
        byte = tar.read(1)
        tar.seek(-1, 1)
        tar.write(bytes([byte[0] ^ 1]))
    since = time.monotonic()
    run = cluster.train(tmp_path / "run", *options, f"data.shards={tmp_path / 'set'}")
    code, errors = run.finish()
    assert code == 3, errors
    line = _told(run, code, errors, "one rank's bad image", since, capsys)
    assert row["key"].hex() in line
    assert _attempts(run) == 1
