"""sweep folder in a store ↔ its small files on this machine, where a sweep's driver reads and writes as on a disk. No Ray.

The store is the truth: what the driver writes here is put there at once, and a copy is read from there when a driver begins and
when its trials have ended. The trials' own files are their workers', each of whom writes under a lease that the driver hands out.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.trial_state import Signs, epochs_logged, place_of, read_specs, trial_name
from medtl_dist.errors import DataError, MedtlError
from medtl_dist.storage import Folder
from medtl_dist.store_folder import StoreFolder
from medtl_dist.train import checkpoint, run_store
from medtl_dist.train.lease import LEASES

# What a driver's decisions come from, and what a sweep's result is made of.
_STATE = ("config.yaml", "space.yaml", "trials.json", "searcher.json")
_STATE_OF_TRIAL = ("trial.json", "config.yaml")
_SCORES = re.compile(r"trials/\d+/(results\.json|predictions/val\.parquet|predictions/epochs/\d+\.npy)")
_AT_ONCE = 8


@dataclass(frozen=True)
class Mirror(Folder):
    """The sweep's folder as its driver sees it: a scratch folder of this machine, and behind it ``store``, under the driver's
    lease. Its name, ``url``, is the store's, and that is where everybody else finds it."""

    store: StoreFolder
    remote = True

    @property
    def url(self) -> str:
        return self.store.url

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file here and in the store. Raises OSError (full) here, MedtlError there, see ``StoreFolder.write``."""
        super().write(name, data)
        self.store.write(name, data)

    def once(self) -> Mirror:
        """The same with one try for each file, for who leaves."""
        return Mirror(self.fs, self.path, self.store.once())

    def fetch_state(self) -> None:
        """Read what an earlier driver left. A trial that ran under it is taken away from its worker, in case that still lives.

        Raises: UserError or Interrupted, see ``StoreFolder``; DataError, a list of trials that is damaged.
        """
        self._fetch(_STATE)
        self._fetch(f"{trial_name(number)}/{name}" for number in self._numbers() for name in _STATE_OF_TRIAL)
        for file in sorted(self.local_path.glob("trials/*/trial.json")):
            if _state_in(file) == "running":
                name = f"trials/{file.parent.name}"
                self.hand_out(name)
                self._fetch_log(name)

    def fetch_scores(self) -> None:
        """Read the trials' results and val scores. Raises as ``fetch_state``."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self._fetch(name for names in pool.map(self._scores_of, self._numbers()) for name in names)

    def publish(self, names: Iterable[str]) -> None:
        """Put files that were written here by path. Raises as ``StoreFolder.write``."""
        for name in names:
            self.store.write(name, (self.local_path / name).read_bytes())

    def hand_out(self, name: str) -> int:
        """A lease on a trial's folder for its next worker; whoever wrote there before can write no more."""
        return run_store.lease_on(self.store.part(name))

    def signs(self, name: str) -> Signs | None:
        """As ``trial_state.signs_of``; None where the store can't be asked just now."""
        trial = self.store.below(name).once()
        telling = re.compile(re.escape(f"{trial.path}/") + rf"({re.escape(LEASES)}/\d+|log\.jsonl|progress\.json)")
        with contextlib.suppress(MedtlError):
            found = [info for info in trial.files() if telling.fullmatch(info.path)]
            return tuple((info.mtime_ns or 0, info.size) for info in sorted(found, key=lambda info: info.path))
        return None

    def _fetch_log(self, folder: str) -> None:
        """The trial's log, and what it lacks: a log follows some seconds behind the checkpoint that a trial goes on from."""
        name, trial = f"{folder}/log.jsonl", self.store.below(folder)
        with contextlib.suppress(DataError):  # nothing logged yet
            super().write(name, trial.read("log.jsonl"))
        here = self.local_path / name
        known = {row["epoch"] for row in epochs_logged(here.parent)}
        meta: dict[str, Any] = checkpoint.newest_meta(trial) or {}
        lines = [{"kind": "epoch"} | row for row in meta.get("history", []) if row["epoch"] not in known]
        with here.open("a", encoding="utf-8") as file:
            file.writelines(f"\n{json.dumps(line)}\n" for line in lines)

    def _numbers(self) -> list[int]:
        return [number for number, _ in read_specs(self.local_path) or []]

    def _scores_of(self, number: int) -> list[str]:
        files = self.store.files(trial_name(number))
        names = [info.path.removeprefix(f"{self.store.path}/") for info in files]
        return [name for name in names if _SCORES.fullmatch(name)]

    def _fetch(self, names: Iterable[str]) -> None:
        """Read files that may be missing."""
        names = list(names)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for name, data in zip(names, pool.map(self._read, names), strict=True):
                if data is not None:
                    place = self.local_path / name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(data)

    def _read(self, name: str) -> bytes | None:
        with contextlib.suppress(DataError):
            return self.store.read(name)
        return None


def next_lease(folder: Path | Folder, name: str) -> int | None:
    """For the worker that takes the trial ``name``; None on a disk, where a lock does it. Raises as ``StoreFolder.write``."""
    place = place_of(folder)
    return place.hand_out(name) if isinstance(place, Mirror) else None


def _state_in(file: Path) -> str | None:
    """The trial's state; None where the file is damaged, which is told when it is read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(file.read_text(encoding="utf-8"))["state"]
    return None
