"""fit → log.jsonl, progress.json and TensorBoard events: what a person or a terminal follows while a run goes on.

Only rank 0 writes. ``log.jsonl`` grows by a line per note and per epoch; ``progress.json`` is replaced about every second.
Where the run folder lies in a store they grow on a local disk, and an ``Outbox`` carries them there.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from medtl_dist.config import Config
from medtl_dist.run import Folder, Run
from medtl_dist.store_folder import StoreFolder
from medtl_dist.train.mlflow_log import MlflowLog
from medtl_dist.train.outbox import Outbox

_PROGRESS_EVERY_S = 1.0
_CARRIED_EVERY_S = 5.0


class Journal:
    """The run's log on rank 0, silent on the others."""

    def __init__(self, run: Run, config: Config, *, first_step: int = 0, one_of_many: bool = False) -> None:
        """``one_of_many``: nobody follows this one; a store hears of it less often. Raises UserError where MLflow is missing."""
        self._folder: Folder | None = run.folder if run.rank == 0 else None
        self._last_progress = 0.0
        self._writer: SummaryWriter | None = None
        self._outbox: Outbox | None = None
        self._followed = not one_of_many
        self._mlflow: MlflowLog | None = None
        if self._folder is not None:
            if isinstance(self._folder, StoreFolder):
                every_s = _CARRIED_EVERY_S * (3 if one_of_many else 1)
                self._outbox = Outbox(self._folder, kept=("log.jsonl",), every_s=every_s)
                self._folder = Folder.local(self._outbox.here)
            if config.train.mlflow_uri is not None:
                self._mlflow = MlflowLog(config, run.folder, self.note)
            self._writer = SummaryWriter(str(self._folder.local_path / "events"), purge_step=first_step or None)

    def note(self, text: str) -> None:
        """A sentence the user should read, and reads in a store at once: what a run waits for, or goes on from."""
        self._append({"kind": "note", "text": text}, urgent=self._followed)

    def epoch(self, row: Mapping[str, Any], *, step: int) -> None:
        """An epoch's row of the history."""
        self._append({"kind": "epoch", "step": step} | dict(row))
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()
            self._carry("events")
        if self._mlflow is not None:
            self._mlflow.epoch(row, step)

    def due(self) -> bool:
        """Whether it is time for :meth:`progress` again; asked so that a loss need not leave its device for nothing."""
        return self._folder is not None and time.monotonic() - self._last_progress >= _PROGRESS_EVERY_S

    def progress(self, row: Mapping[str, Any]) -> None:
        """Where the run stands, replacing what it said before."""
        if self._folder is not None:
            self._last_progress = time.monotonic()
            with contextlib.suppress(OSError):  # a full disk is the checkpoint's to report, on every rank
                self._folder.write("progress.json", json.dumps(dict(row)).encode())
            self._carry("progress.json")

    def close(self) -> None:
        if self._mlflow is not None:
            self._mlflow.close()
            self._mlflow = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._outbox is not None:
            self._outbox.close()
            self._outbox = None

    def _append(self, row: Mapping[str, Any], *, urgent: bool = False) -> None:
        if self._folder is None:
            return
        stamped = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")} | dict(row)
        with contextlib.suppress(OSError), (self._folder.local_path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(stamped) + "\n")
        self._carry("log.jsonl", urgent=urgent)

    def _carry(self, name: str, *, urgent: bool = False) -> None:
        """Have a file, or the files of a folder, put to the store where the run folder lies in one."""
        if self._outbox is not None:
            place = self._outbox.here / name
            for path in place.iterdir() if place.is_dir() else [place]:
                self._outbox.changed(str(path.relative_to(self._outbox.here)), urgent=urgent)
