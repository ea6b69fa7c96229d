"""outcomes and trial folders → sweep.parquet, sweep.json and sweep.html: a sweep's result, whole or of what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medtl_dist.config import Config
from medtl_dist.errors import DataError
from medtl_dist.storage import Folder
from medtl_dist.sweep.outcome import Outcome


def write_result(folder: Path, base: Config, outcomes: list[Outcome]) -> None:
    """Write the sweep's table, its ranking and its page."""
    ranked = sorted(
        (one for one in outcomes if one.best is not None and one.state in ("finished", "stopped")),
        key=lambda one: (-(one.best.val_auc or 0.0), one.best.val_loss, one.number) if one.best is not None else (),
    )
    unranked = [(one.number, one.reason or one.state) for one in outcomes if one not in ranked]
    found = {
        "winner": ranked[0].number if ranked else None,
        "order": [one.number for one in ranked],
        "unranked": unranked,
    }
    Folder.local(folder).write("sweep.json", json.dumps(found, indent=1, allow_nan=False).encode())


def read_result(folder: Path) -> dict[str, Any]:
    """``sweep.json`` of a sweep. Raises DataError where it is missing or damaged."""
    try:
        return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(
            f"{folder / 'sweep.json'}: missing or damaged; the same command with --resume writes it."
        ) from None
