"""A limit of GPU hours ─► ``Run.poll``: training stops at a checkpoint when they are used up, over all attempts of a run.

``budget.json`` in the run folder holds the limit and what has been used; rank 0 keeps it up to date, so that a driver, worker
or node that is lost takes at most the last few seconds of the account with it. A rank counts as one GPU, with or without one.

A chain or comparison has one limit for all its trainings. They come one after another, so each gets what the others have left
of it as a limit of its own, and keeps an account of its own: nobody writes in two folders. The whole's ``budget.json`` holds
the limit, and the sum as of the time when the last training began.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from medtl_dist import collectives
from medtl_dist.errors import DataError, MedtlError, TrainingError, UserError
from medtl_dist.run import Folder, Run, Signal
from medtl_dist.store_folder import StoreFolder
from medtl_dist.train.run_folder import parts_in

BUDGET_FILE = "budget.json"
_NOTE_EVERY_S = 10.0


def limit(folder: Folder, gpu_hours: float | None, *, whole: Folder | None = None) -> None:
    """Set the run's limit, keeping the account of earlier attempts; None leaves no limit.

    ``whole``: the folder of the chain or comparison of which this is a training; the limit is that of all its trainings.

    Raises:
        UserError: a limit that is no positive number.
        TrainingError: it is used up already.
    """
    check(gpu_hours)
    before = read(folder)
    if gpu_hours is None and before is None and (whole is None or read(whole) is None):
        return
    used, elsewhere = before["gpu_hours"] if before else 0.0, used_elsewhere(whole, folder)
    if whole is not None:
        _write(whole, gpu_hours, elsewhere + used)
        if gpu_hours is not None and elsewhere >= gpu_hours:
            raise _used_up(elsewhere + used, gpu_hours)
    _write(folder, None if gpu_hours is None else gpu_hours - elsewhere, used)
    raise_if_used_up(folder, whole=whole)


def check(gpu_hours: float | None) -> None:
    """Raises UserError for a limit that is no positive number."""
    if gpu_hours is not None and not (math.isfinite(gpu_hours) and gpu_hours > 0):
        raise UserError(f"--max-gpu-hours {gpu_hours:g}: expected a positive number of hours.")


def used_elsewhere(whole: Folder | None, folder: Folder) -> float:
    """GPU hours that the whole's other trainings have used; none where there is no whole."""
    if whole is None:
        return 0.0
    others = [part for part in map(whole.part, parts_in(whole)) if part.url != folder.url]
    return math.fsum(account["gpu_hours"] for account in map(read, others) if account is not None)


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


def raise_if_used_up(folder: Folder, *, whole: Folder | None = None) -> None:
    """Raises TrainingError, the run's own state: run again as it is, it would not go on. ``whole``: as of ``limit``."""
    row = read(folder)
    if row is not None and row["max_gpu_hours"] is not None and row["gpu_hours"] >= row["max_gpu_hours"]:
        elsewhere = used_elsewhere(whole, folder)
        raise _used_up(row["gpu_hours"] + elsewhere, row["max_gpu_hours"] + elsewhere)


def _used_up(used: float, most: float) -> TrainingError:
    return TrainingError(
        f"stopped: {used:.4g} of {most:g} GPU hours are used; its checkpoints are kept, and the same command with --resume and "
        "a larger --max-gpu-hours goes on."
    )


def _write(folder: Folder, most: float | None, used: float) -> None:
    folder.write(BUDGET_FILE, json.dumps({"max_gpu_hours": most, "gpu_hours": used}).encode())


@contextlib.contextmanager
def budgeted(run: Run) -> Iterator[Run]:
    """The run, stopped when the limit in its folder is used up, and its account closed with the block; the run itself where
    there never was a limit. Every rank calls it."""
    row = collectives.from_rank_0(read(run.folder) if run.rank == 0 else None)
    if row is None:
        yield run
        return
    limited = _BudgetedRun(run, row["max_gpu_hours"], row["gpu_hours"])
    try:
        yield limited
    finally:
        limited.close()


class _BudgetedRun:
    """A run with an account. Time counts from here on, so waiting for a cluster's nodes is free."""

    def __init__(self, run: Run, max_gpu_hours: float | None, used: float) -> None:
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
            used_up = self._max is not None and self._hours() >= self._max
            if used_up or time.monotonic() - self._noted >= _NOTE_EVERY_S:
                self._noted = time.monotonic()
                with contextlib.suppress(OSError):  # a full disk is the checkpoint's to report
                    _write(self.folder, self._max, self._hours())
        return Signal(collectives.largest(max(int(own), int(used_up))))

    def close(self) -> None:
        """Note what was used since the last poll: a chain's other trainings have that much less."""
        if self.rank != 0:
            return
        folder = self.folder.once() if isinstance(self.folder, StoreFolder) else self.folder
        with contextlib.suppress(OSError, MedtlError):  # what has ended the run is told, not a store that fails as well
            _write(folder, self._max, self._hours())

    def _hours(self) -> float:
        return self._before + (time.monotonic() - self._began) * self.world_size / 3600
