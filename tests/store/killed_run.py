"""`medtl` in a process of its own, with the tiny network, that is killed at a poll: every five steps a run is asked to stop.

Usage: python killed_run.py POLL LEASE_TTL_S ARGUMENT…; POLL 0: not killed; POLL@NAME: polls of the run folder of that name count.
"""

from __future__ import annotations

import os
import signal
import sys

from tiny_backbone import tiny_registered

from medtl_dist.cli.main import run
from medtl_dist.run import LocalRun, Signal
from medtl_dist.train import run_store


def main() -> int:
    deadly, _, name = sys.argv[1].partition("@")
    polls, asked = 0, LocalRun.poll
    run_store.LEASE_TTL_S = float(sys.argv[2])

    def poll(self: LocalRun) -> Signal:
        nonlocal polls
        polls += self.folder.path.endswith(name)
        if polls == int(deadly):
            os.kill(os.getpid(), signal.SIGKILL)
        return asked(self)

    LocalRun.poll = poll  # type: ignore[method-assign]
    with tiny_registered():
        return run(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
