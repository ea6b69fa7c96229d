"""run folder → where a run stands, from its own files alone: for a person who did not start it, or a script."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medtl_dist.errors import DataError, UserError
from medtl_dist.run import Folder
from medtl_dist.train import budget
from medtl_dist.train.run_folder import chain_finished, parts_of

_FACTS = (
    "epoch",
    "epochs",
    "step",
    "steps",
    "loss",
    "images_per_s",
    "data_wait_fraction",
    "best_val_auc",
    "seconds_left",
)


def status_of(run_folder: Path) -> dict[str, Any]:
    """Where the run stands, as plain values.

    ``state``: finished (its results are there), running (a process holds the folder's lock), or stopped (``medtl train
    --resume`` goes on). ``parts``: the same of each training of a chain.
    ``progress``: the last known step, null where there is none. ``epochs``: the finished ones, as logged;
    one that was run again after a lost process counts once, the last time. ``budget``: the GPU hours used and their limit
    (null: none now), noted every few seconds; of a chain over all its trainings, each of which has what the others leave it; null
    where the run never had a limit. ``notes``: the last five.

    Raises UserError where the folder holds no run.
    """
    if not (run_folder / "config.yaml").is_file():
        raise UserError(f"{run_folder} is not a run folder: it has no config.yaml.")
    lines = _lines(run_folder / "log.jsonl")
    epochs = {line["epoch"]: line for line in lines if line.get("kind") == "epoch"}
    progress: dict[str, Any] | None = None
    with contextlib.suppress(OSError, ValueError):
        row = json.loads((run_folder / "progress.json").read_text(encoding="utf-8"))
        progress = {name: row.get(name) for name in _FACTS}
    account: dict[str, Any] | None = None
    with contextlib.suppress(DataError):  # damaged: training says so
        account = budget.read(Folder.local(run_folder))
    held = _held(run_folder / ".lock")
    finished = (run_folder / "results.json").is_file() or chain_finished(run_folder)
    parts = [status_of(part) for part in parts_of(run_folder)]
    return {
        "run": run_folder.name,
        "state": "running" if held else "finished" if finished else "stopped",
        "seconds_since_news": _age_s(run_folder),
        "parts": parts,
        "progress": progress,
        "epochs": [epochs[number] for number in sorted(epochs)],
        "budget": over_all(account, parts),
        "checkpoints": sorted(int(p.name) for p in (run_folder / "checkpoints").glob("*") if p.name.isdigit()),
        "notes": [line["text"] for line in lines if line.get("kind") == "note"][-5:],
    }


def over_all(account: Mapping[str, Any] | None, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A run's account, of a chain with what its trainings have used by now."""
    if account is None:
        return None
    used = [part["budget"]["gpu_hours"] for part in parts if part["budget"] is not None]
    return dict(account) | ({"gpu_hours": math.fsum(used)} if used else {})


def _lines(log: Path) -> list[dict[str, Any]]:
    """The log's whole lines; one that is being written, or was cut off, is left out."""
    found: list[dict[str, Any]] = []
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                found.append(row)
    return found


def _held(lock: Path) -> bool:
    """Whether a process of this machine writes in the folder; never waits, and leaves the lock as it was."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _age_s(run_folder: Path) -> float | None:
    """Seconds since the run last wrote a line or its progress."""
    times = [
        (run_folder / name).stat().st_mtime for name in ("log.jsonl", "progress.json") if (run_folder / name).is_file()
    ]
    return max(0.0, datetime.datetime.now().timestamp() - max(times)) if times else None
