"""A pack that is killed leaves no set behind, and no process; the next one starts cleanly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.errors import UserError

PACK = """
import sys
from medtl_dist.data.pack import PackOptions, pack
if __name__ == "__main__":
    pack(sys.argv[1], sys.argv[2], PackOptions(num_workers=2))
"""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.01)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Enough images that a pack is caught in the middle."""
    images = np.random.default_rng(0).integers(0, 256, (1_500, 28, 28), dtype=np.uint8)
    labels = (np.arange(1_500) % 2).astype(np.uint8)[:, None]
    np.savez(tmp_path / "in.npz", train_images=images, train_labels=labels)
    return tmp_path / "in.npz"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc to see that no process is left")
def test_a_killed_pack_leaves_no_set_and_the_next_starts_cleanly(tmp_path: Path, source: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PACK, encoding="utf-8")
    command = [sys.executable, str(script), str(source), str(tmp_path / "set")]
    work = tmp_path / ".set.packing/set"

    process = subprocess.Popen(command)
    wait_for(lambda: len(list(work.glob("*.tar"))) >= 2 or process.poll() is not None, "the second shard")
    assert process.poll() is None, "the pack ended before it could be killed"
    with pytest.raises(UserError, match="another process is packing to"):
        pack(source, tmp_path / "set")
    workers = children(process.pid)
    assert len(workers) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "set").exists()
    assert work.exists()
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers), "the workers to end")

    dataset = pack(source, tmp_path / "set", PackOptions(num_workers=2))
    assert sum(entry["samples"] for entry in dataset.info["splits"].values()) == 1_500
    assert not (tmp_path / ".set.packing").exists()
