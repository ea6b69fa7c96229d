"""A limit of GPU hours ─► ``Run.poll``: training stops at a checkpoint when they are used up, over all attempts of a run.

``budget.json`` in the run folder holds the limit and what has been used; rank 0 keeps it up to date, so that a driver, worker
or node that is lost takes at most the last few seconds of the account with it. A rank counts as one GPU, with or without one.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from medtl_dist import collectives
from medtl_dist.errors import DataError, TrainingError, UserError
from medtl_dist.run import Folder, Run, Signal

BUDGET_FILE = "budget.json"
_NOTE_EVERY_S = 10.0


def limit(folder: Folder, gpu_hours: float | None) -> None:
    """Set the run's limit, keeping the account of earlier attempts; None leaves no limit.

    Raises:
        UserError: a limit that is no positive number.
        TrainingError: it is used up already.
    """
    if gpu_hours is not None and not (math.isfinite(gpu_hours) and gpu_hours > 0):
        raise UserError(f"--max-gpu-hours {gpu_hours:g}: expected a positive number of hours.")
    before = read(folder)
    if gpu_hours is None and before is None:
        return
    used = before["gpu_hours"] if before else 0.0
    folder.write(BUDGET_FILE, json.dumps({"max_gpu_hours": gpu_hours, "gpu_hours": used}).encode())
    raise_if_used_up(folder)


def read(folder: Folder) -> dict[str, Any] | None:
    """``max_gpu_hours`` (None: no limit) and ``gpu_hours`` used; None: never had a limit. Raises DataError if damaged."""
    if not folder.exists(BUDGET_FILE):
        return None
    try:
        row = json.loads(folder.read(BUDGET_FILE))
        most, used = row["max_gpu_hours"], row["gpu_hours"]
        return {"max_gpu_hours": None if most is None else float(most), "gpu_hours": float(used)}
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{folder.at(BUDGET_FILE)} is damaged; delete it to start the account of GPU hours anew."
        ) from None


def raise_if_used_up(folder: Folder) -> None:
    """Raises TrainingError, the run's own state: run again as it is, it would not go on."""
    row = read(folder)
    if row is not None and row["max_gpu_hours"] is not None and row["gpu_hours"] >= row["max_gpu_hours"]:
        raise TrainingError(
            f"stopped: {row['gpu_hours']:.4g} of {row['max_gpu_hours']:g} GPU hours are used; its last checkpoint is kept, and "
            "the same command with --resume and a larger --max-gpu-hours goes on."
        )


def budgeted(run: Run) -> Run:
    """The run, stopped when the limit in its folder is used up; the run itself where there is no limit. Every rank calls it."""
    row = collectives.from_rank_0(read(run.folder) if run.rank == 0 else None)
    return (
        run
        if row is None or row["max_gpu_hours"] is None
        else _BudgetedRun(run, row["max_gpu_hours"], row["gpu_hours"])
    )


class _BudgetedRun:
    """A run with an account. Time counts from here on, so waiting for a cluster's nodes is free."""

    def __init__(self, run: Run, max_gpu_hours: float, used: float) -> None:
        self._run, self._max, self._before = run, max_gpu_hours, used
        self._began = time.monotonic()
        self._noted = -math.inf

    @property
    def rank(self) -> int:
        return self._run.rank

    @property
    def world_size(self) -> int:
        return self._run.world_size

    @property
    def local_rank(self) -> int:
        return self._run.local_rank

    @property
    def device(self) -> torch.device:
        return self._run.device

    @property
    def folder(self) -> Folder:
        return self._run.folder

    def report(self, metrics: Mapping[str, float | int | None]) -> None:
        self._run.report(metrics)

    def poll(self) -> Signal:
        """The run's own answer, or the stop at the limit, which rank 0's clock decides for all."""
        own, used_up = self._run.poll(), False
        if self.rank == 0:
            hours = self._before + (time.monotonic() - self._began) * self.world_size / 3600
            used_up = hours >= self._max
            if used_up or time.monotonic() - self._noted >= _NOTE_EVERY_S:
                self._noted = time.monotonic()
                with contextlib.suppress(OSError):  # a full disk is the checkpoint's to report
                    row = {"max_gpu_hours": self._max, "gpu_hours": hours}
                    self.folder.write(BUDGET_FILE, json.dumps(row).encode())
        return Signal(collectives.largest(max(int(own), int(used_up))))
