"""`medtl tune` in processes of its own: started, watched by what it leaves in its folder, killed, and counted by a mark."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LIMIT_S = 400.0  # of one command; on an idle machine of two cores they take a minute or two
MARK = "MEDTL_TESTMARK"  # in the environment of a command and so of every process that it starts


class Driver:
    """`medtl tune` in a process of its own; every process that it starts can be found by its mark."""

    def __init__(self, *arguments: str | Path) -> None:
        self.mark = uuid.uuid4().hex
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "medtl_dist.cli.main", "tune", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | {MARK: self.mark},
        )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """Exit code and what it printed."""
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, out + err


@contextlib.contextmanager
def driving(*arguments: str | Path) -> Iterator[Driver]:
    driver = Driver(*arguments)
    try:
        yield driver
    finally:
        if driver.process.poll() is None:
            driver.process.kill()
            driver.process.communicate()


def processes_of(mark: str) -> dict[int, str]:
    """Living processes with the mark in their environment: pid and command."""
    found: dict[int, str] = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (place / "environ").read_bytes().split(b"\0"):
                found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"never {what}")


def trial(folder: Path, number: int) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "trials" / f"{number:05d}" / "trial.json").read_text())
    return {"state": "waiting", "curve": []}
