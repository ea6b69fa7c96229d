"""outcomes → sweep.parquet, a row per trial, and back. One file says what was tried, what came of it and what it cost."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from medtl_dist.errors import DataError
from medtl_dist.storage import Folder
from medtl_dist.sweep.outcome import Epoch, Outcome, State
from medtl_dist.sweep.ranking import Ranking

TABLE = "sweep.parquet"
_CURVE = (("epoch", pa.int64()), ("val_auc", pa.float64()), ("val_loss", pa.float64()), ("train_loss", pa.float64()),
          ("epoch_end_s", pa.float64()))  # fmt: skip


def write_table(folder: Path, outcomes: Sequence[Outcome], ranking: Ranking | None = None) -> Path:
    """Write ``sweep.parquet``, all of it or nothing, and return its path. ``ranking`` adds ranks and intervals.

    Columns: ``trial, state, reason, rank, auc, auc_low, auc_high, best_epoch, frozen_depth, num_stages, seconds, cpu_hours,
    gpu_hours, attempts, cached_s, folder``; the curve as lists (``epoch, val_auc, val_loss, train_loss, epoch_end_s``, one
    value per epoch); a column per config key that some trial overrides, null where a trial does not; ``overrides`` as JSON.

    Raises:
        OSError: the folder can't be written.
    """
    sink = io.BytesIO()
    pq.write_table(_table(outcomes, ranking), sink)
    target = folder / TABLE
    Folder.local(target.parent).write(target.name, sink.getvalue())
    return target


def _table(outcomes: Sequence[Outcome], ranking: Ranking | None) -> pa.Table:
    ordered = sorted(outcomes, key=lambda one: one.number)
    ranks = {number: place for place, number in enumerate(ranking.order, start=1)} if ranking is not None else {}
    intervals = [ranking.intervals.get(one.number) if ranking is not None else None for one in ordered]
    bounds = [
        found.interval if found is not None and found.interval is not None else (None, None) for found in intervals
    ]
    columns: dict[str, pa.Array] = {
        "trial": pa.array([one.number for one in ordered], pa.int64()),
        "state": pa.array([one.state for one in ordered], pa.string()),
        "reason": pa.array([one.reason for one in ordered], pa.string()),
        "rank": pa.array([ranks.get(one.number) for one in ordered], pa.int64()),
        "auc": pa.array([one.best.val_auc if one.best else None for one in ordered], pa.float64()),
        "auc_low": pa.array([low for low, _ in bounds], pa.float64()),
        "auc_high": pa.array([high for _, high in bounds], pa.float64()),
        "best_epoch": pa.array([one.best.epoch if one.best else None for one in ordered], pa.int64()),
        "frozen_depth": pa.array([one.frozen_depth for one in ordered], pa.int64()),
        "num_stages": pa.array([one.num_stages for one in ordered], pa.int64()),
        "seconds": pa.array([one.seconds for one in ordered], pa.float64()),
        "cpu_hours": pa.array([one.cpu_hours for one in ordered], pa.float64()),
        "gpu_hours": pa.array([one.gpu_hours for one in ordered], pa.float64()),
        "attempts": pa.array([one.attempts for one in ordered], pa.int64()),
        "cached_s": pa.array([one.cached_s for one in ordered], pa.float64()),
        "folder": pa.array([one.folder for one in ordered], pa.string()),
    }
    for (name, kind), field in zip(_CURVE, ("epoch", "val_auc", "val_loss", "train_loss", "seconds"), strict=True):
        columns[name] = pa.array([[getattr(row, field) for row in one.curve] for one in ordered], pa.list_(kind))
    for key in sorted({key for one in ordered for key in one.overrides}):
        columns[key] = _override_column([one.overrides.get(key) for one in ordered])
    columns["overrides"] = pa.array([json.dumps(dict(one.overrides), allow_nan=False) for one in ordered], pa.string())
    return pa.table(columns)


def _override_column(values: Sequence[Any]) -> pa.Array:
    """Numbers as numbers, truths as truths, anything else (or a mixture) as text."""
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, bool) for value in given):
        return pa.array(values, pa.bool_())
    if given and all(isinstance(value, int) and not isinstance(value, bool) for value in given):
        return pa.array(values, pa.int64())
    if given and all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    texts = [
        value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True) for value in values
    ]
    return pa.array(texts, pa.string())


def read_table(folder: Path) -> list[Outcome]:
    """The outcomes that ``write_table`` wrote, by number.

    Raises:
        DataError: the file is missing or damaged.
    """
    file = folder / TABLE
    if not file.is_file():
        raise DataError(f"{file}: there is none; a sweep writes it when its first trial ends: medtl tune --resume")
    try:
        return [_outcome(row) for row in pq.read_table(file).to_pylist()]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        raise DataError(f"{file}: damaged; the sweep writes it again from its trials: medtl tune --resume") from None


def _outcome(row: dict[str, Any]) -> Outcome:
    if row["state"] not in get_args(State):
        raise ValueError(row["state"])
    overrides = json.loads(row["overrides"])
    if not isinstance(overrides, dict):
        raise TypeError("overrides")
    lists = [row[name] for name, _ in _CURVE]
    plain = (
        "state",
        "reason",
        "frozen_depth",
        "num_stages",
        "seconds",
        "cpu_hours",
        "gpu_hours",
        "attempts",
        "cached_s",
        "folder",
    )
    curve = tuple(Epoch(*values) for values in zip(*lists, strict=True))
    return Outcome(number=row["trial"], overrides=overrides, curve=curve, **{name: row[name] for name in plain})
