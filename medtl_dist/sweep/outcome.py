"""a trial's run folder → what the sweep keeps of it: the one record that ranking, table and page are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Epoch:
    """One epoch (from 0) of a trial: exact pooled val AUC (None where undefined), losses, seconds since the trial began."""

    epoch: int
    val_auc: float | None
    val_loss: float
    train_loss: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """One trial.

    Attributes:
        number: from 0, in the order drawn.
        overrides: dotted config key → plain value, what the space drew.
        state: finished (all its epochs), stopped (by the scheduler), failed (retries used up), or not ended yet.
        reason: why it failed or was stopped, or why its AUC is undefined; one sentence.
        curve: its epochs, ascending.
        frozen_depth, num_stages: of its network, to say what is simpler.
        seconds: busy, over all attempts; cpu_hours, gpu_hours: reserved resources times that.
        attempts: starts after failures, 1 for a trial without any.
        cached_s: seconds of ``seconds`` spent on the prefix cache (computing or reading it); None: not used.
        folder: its run folder, relative to the sweep's.
    """

    number: int
    overrides: Mapping[str, Any]
    state: State
    reason: str | None
    curve: tuple[Epoch, ...]
    frozen_depth: int
    num_stages: int
    seconds: float
    cpu_hours: float
    gpu_hours: float
    attempts: int
    cached_s: float | None
    folder: str

    @property
    def best(self) -> Epoch | None:
        """The epoch with the highest defined val AUC, ties by the lower val loss, then the earlier one."""
        defined = [row for row in self.curve if row.val_auc is not None]
        return max(defined, key=lambda row: (row.val_auc or 0.0, -row.val_loss, -row.epoch), default=None)
