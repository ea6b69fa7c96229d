"""predictions → a ledger beside the runs: how often a data set's test split was scored, and by how many configurations.

``test_openings.jsonl`` on a disk. In a store, which can't append, an object per opening, whose name says it all:
``test_openings/<data set>/<configuration>-<time>-<random>``; two runs that end at once both count.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import secrets
from pathlib import Path

from medtl_dist.store_folder import StoreFolder, store_folder
from medtl_dist.train.run_folder import above, whole_of

LEDGER = "test_openings.jsonl"
_IN_STORE = "test_openings"


def record_opening(run_folder: Path, *, dataset_sha256: str, config_sha256: str) -> dict[str, int]:
    """Append one opening of a data set's test split to the ledger beside the run folder; return :func:`count_openings`."""
    entry = {
        "dataset_sha256": dataset_sha256,
        "config_sha256": config_sha256,
        "run": run_folder.name,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with _ledger_of(run_folder).open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(entry) + "\n")
    return count_openings(run_folder, dataset_sha256)


def count_openings(run_folder: Path, dataset_sha256: str) -> dict[str, int]:
    """``{"count", "configurations"}`` of a data set, over all runs beside this one. A line that can't be read counts too."""
    path = _ledger_of(run_folder)
    entries: list[dict[str, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = {"dataset_sha256": dataset_sha256, "config_sha256": line}
        if entry.get("dataset_sha256") == dataset_sha256:
            entries.append(entry)
    return {"count": len(entries), "configurations": len({entry.get("config_sha256") for entry in entries})}


def record_opening_in_store(run: StoreFolder, *, dataset_sha256: str, config_sha256: str) -> dict[str, int]:
    """As ``record_opening``, for a run in a store, or a stage of one. Raises MedtlError, see ``StoreFolder``."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    entry = json.dumps({"run": run.place.name}).encode()
    _whole_in_store(run).sibling(_IN_STORE).write(
        f"{dataset_sha256}/{config_sha256}-{stamp}-{secrets.token_hex(8)}.json", entry
    )
    return count_openings_in_store(run, dataset_sha256)


def count_openings_in_store(run: StoreFolder, dataset_sha256: str) -> dict[str, int]:
    """As ``count_openings``, for runs in a store."""
    entries = _whole_in_store(run).sibling(_IN_STORE).names(dataset_sha256)
    return {"count": len(entries), "configurations": len({entry.partition("-")[0] for entry in entries})}


def _whole_in_store(run: StoreFolder) -> StoreFolder:
    """The run, the chain that it is a stage of, or the sweep whose winner it trains: beside that the ledger lies."""
    place, _, part = run.place.url.rpartition("/")[0].rpartition("/")
    if part == "winner" and "/" in place.partition("://")[2]:
        sweep = store_folder(place, run.options)
        if sweep.exists("space.yaml"):
            return sweep
    return whole_of(run)


def _ledger_of(run_folder: Path) -> Path:
    """Beside the run; beside the whole chain or sweep where the run is a part of one, so that all openings add up."""
    if run_folder.parent.name == "winner" and (run_folder.parents[1] / "space.yaml").is_file():
        return run_folder.parents[2] / LEDGER
    whole = Path(above(run_folder))
    return (whole if (whole / "config.yaml").is_file() else run_folder).parent / LEDGER
