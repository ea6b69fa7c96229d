"""a sweep folder ↔ where its trials stand: what the driver writes after every event and finds again after a crash. No Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medtl_dist.config import Config
from medtl_dist.errors import DataError
from medtl_dist.storage import Folder
from medtl_dist.sweep.outcome import Epoch, Outcome, State

TRIAL_FILE = "trial.json"
_ALIVE_FILE = ".alive"
_STATES = ("waiting", "running", "finished", "stopped", "failed")


@dataclass(frozen=True)
class TrialSpec:
    """One trial to run: its number from 0, what was drawn for it, and the whole config that comes of it. ``folder``: where below
    the whole it runs; None: where trials of a sweep do."""

    number: int
    overrides: Mapping[str, Any]
    config: Config
    folder: str | None = None

    @property
    def name(self) -> str:
        """The folder of its run below the whole's."""
        return self.folder or trial_name(self.number)


@dataclass
class Trial:
    """Where a trial stands. ``failures``: crashes after which it was tried again; ``seconds``: of all attempts."""

    spec: TrialSpec
    state: State = "waiting"
    reason: str | None = None
    failures: int = 0
    seconds: float = 0.0
    cached_s: float | None = None
    curve: dict[int, Epoch] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return self.spec.number

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Reserved:
    """What one running trial holds of the cluster, all its workers together."""

    cpus: float
    gpus: float = 0.0


def trial_name(number: int) -> str:
    """The folder of a trial's run below the sweep's."""
    return f"trials/{number:05d}"


def place_of(folder: Path | Folder) -> Folder:
    """A sweep's folder by its path, or as it is (``sweep_mirror.Mirror``, where it lies in a store)."""
    return folder if isinstance(folder, Folder) else Folder.local(folder)


def write_trial(folder: Path | Folder, trial: Trial) -> None:
    """Replace the trial's ``trial.json``: a reader sees the old one or the new one. Raises OSError when the disk is full."""
    row = {
        "number": trial.number,
        "state": trial.state,
        "reason": trial.reason,
        "failures": trial.failures,
        "seconds": trial.seconds,
        "cached_s": trial.cached_s,
        "curve": [_plain(dataclasses.asdict(trial.curve[epoch])) for epoch in sorted(trial.curve)],
    }
    place_of(folder).write(f"{trial.spec.name}/{TRIAL_FILE}", json.dumps(row, indent=1, allow_nan=False).encode())


def read_trial(folder: Path, spec: TrialSpec) -> Trial:
    """The trial as an earlier driver left it; waiting where there was none.

    Raises:
        DataError: a ``trial.json`` that is damaged.
    """
    path = folder / spec.name / TRIAL_FILE
    if not path.is_file():
        return Trial(spec)
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        epochs = [Epoch(**dict(entry, train_loss=_number(entry["train_loss"]), val_loss=_number(entry["val_loss"])))
                  for entry in row["curve"]]  # fmt: skip
        if row["state"] not in _STATES or row["number"] != spec.number:
            raise ValueError
        return Trial(
            spec, row["state"], row["reason"], row["failures"], row["seconds"], row["cached_s"],
            {epoch.epoch: epoch for epoch in epochs},
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{path}: damaged. Delete the file: the trial then goes on from its newest checkpoint."
        ) from None


def epochs_logged(run_folder: Path) -> list[dict[str, Any]]:
    """The epochs that the training itself has logged in its run folder, each once, ascending."""
    rows: dict[int, dict[str, Any]] = {}
    with contextlib.suppress(OSError):
        for line in (run_folder / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and row.get("kind") == "epoch":
                    rows[row["epoch"]] = row
    return [rows[epoch] for epoch in sorted(rows)]


Signs = tuple[tuple[int, int], ...]


def beat(run_folder: Path) -> None:
    """From the training, now and then: it is alive, though it has nothing to tell."""
    with contextlib.suppress(OSError):  # a full disk is the checkpoint's to report
        (run_folder / _ALIVE_FILE).touch()


def signs_of(run_folder: Path) -> Signs:
    """What a training that goes on changes. Only to be compared with another look: hosts' clocks differ."""
    found = []
    for name in (_ALIVE_FILE, "progress.json", "log.jsonl"):
        with contextlib.suppress(OSError):
            status = (run_folder / name).stat()
            found.append((status.st_mtime_ns, status.st_size))
    return tuple(found)


def epoch_of(row: Mapping[str, Any], seconds: float) -> Epoch:
    """A row that the training reported as the sweep keeps it; an AUC that is not a number is an undefined one."""
    auc = row.get("val_auc")
    defined = auc is not None and math.isfinite(auc)
    return Epoch(
        epoch=int(row["epoch"]),
        val_auc=float(auc) if auc is not None and defined else None,
        val_loss=_number(row.get("val_loss")),
        train_loss=_number(row.get("train_loss")),
        seconds=seconds,
    )


def outcome_of(trial: Trial, reserved: Reserved, *, frozen_depth: int, num_stages: int, seconds: float) -> Outcome:
    """The trial's record; ``seconds``: of the attempt that is under way. One that has ended without any AUC says so."""
    curve = tuple(trial.curve[epoch] for epoch in sorted(trial.curve))
    reason = trial.reason
    if trial.state in ("finished", "stopped") and all(row.val_auc is None for row in curve):
        reason = "its val AUC is undefined in every epoch" + (f"; {reason}" if reason else "")
    busy = trial.seconds + seconds
    return Outcome(
        number=trial.number,
        overrides=dict(trial.spec.overrides),
        state=trial.state,
        reason=reason,
        curve=curve,
        frozen_depth=frozen_depth,
        num_stages=num_stages,
        seconds=busy,
        cpu_hours=reserved.cpus * busy / 3600,
        gpu_hours=reserved.gpus * busy / 3600,
        attempts=trial.failures + 1,
        cached_s=trial.cached_s,
        folder=trial.spec.name,
    )


def write_specs(folder: Path | Folder, drawn: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
    """Replace ``trials.json``, the list of what was drawn."""
    rows = [{"number": number, "overrides": dict(overrides)} for number, overrides in drawn]
    place_of(folder).write("trials.json", json.dumps(rows, indent=1, allow_nan=False).encode())


def read_specs(folder: Path) -> list[tuple[int, dict[str, Any]]] | None:
    """What was drawn, in order; None where nothing was yet. Raises DataError where the file is damaged."""
    path = folder / "trials.json"
    if not path.is_file():
        return None
    try:
        rows = [(int(row["number"]), dict(row["overrides"])) for row in json.loads(path.read_text(encoding="utf-8"))]
        if [number for number, _ in rows] != list(range(len(rows))):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: damaged; start the sweep again in a new folder.") from None
    return rows


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
