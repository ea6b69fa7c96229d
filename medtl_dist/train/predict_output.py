"""scores → tables: a part of an output, and all parts as one file with its bad inputs and patients beside it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medtl_dist.data.encoding import Failure
from medtl_dist.data.inputs import Inputs
from medtl_dist.data.label_sets import TASK
from medtl_dist.data.seeing import Seen
from medtl_dist.errors import DataError
from medtl_dist.metrics.scores import probability
from medtl_dist.train.predictor import Predictor

_REFUSED, _BAD = "left out", "bad"
_ROW_GROUP = 65536


def part_table(
    predictor: Predictor, inputs: Inputs, seen: Sequence[Seen], logits: Sequence[NDArray[np.float64] | None]
) -> pa.Table:
    """One row per input: its identity, its scores, or ``status`` and ``reason`` where it has none."""
    columns: dict[str, pa.Array] = {
        name: pa.array([one.identity[name] for one in seen], kind) for name, kind in identity_fields(inputs)
    }
    scored = np.array([values is not None for values in logits], bool)
    nothing = np.zeros(len(predictor.classes))
    values = np.array([nothing if one is None else one for one in logits]).reshape(len(seen), len(predictor.classes))
    columns |= score_columns(predictor, values, scored)
    columns["status"] = pa.array(
        [None if one else _REFUSED if row.refused else _BAD for one, row in zip(scored, seen, strict=True)], pa.string()
    )
    columns["reason"] = pa.array(
        [
            row.image.reason if not one and isinstance(row.image, Failure) else None
            for one, row in zip(scored, seen, strict=True)
        ],
        pa.string(),
    )
    return pa.table(columns)


def identity_fields(inputs: Inputs) -> list[tuple[str, pa.DataType]]:
    """The columns that say which image a row is."""
    own: list[tuple[str, pa.DataType]] = [("file", pa.string()), ("row", pa.int32())]
    if inputs.dataset is not None:
        own = [("split", pa.string()), ("key", pa.string())]
    return own + ([("group", pa.string())] if inputs.grouped else [])


def score_columns(
    predictor: Predictor, logits: NDArray[np.float64], scored: NDArray[np.bool_], *, unit: str = "image"
) -> dict[str, pa.Array]:
    """logit_ and score_ per class, and what is predicted where that is decided: by the threshold that was fixed on val
    for this unit, of several classes by the largest score."""
    mask = ~scored
    columns = {f"logit_{name}": pa.array(logits[:, k], mask=mask) for k, name in enumerate(predictor.classes)}
    for k, name in enumerate(predictor.classes):
        columns[f"score_{name}"] = pa.array(probability(logits[:, k]), mask=mask)
    if predictor.task == TASK:
        for k, name in enumerate(predictor.classes):
            fixed = (predictor.thresholds or {}).get(name)
            if fixed is not None and predictor.unit == unit:
                columns[f"predicted_{name}"] = pa.array(logits[:, k] >= fixed["logit"], mask=mask)
        return columns
    chosen = logits.argmax(axis=1)
    if predictor.task == "binary":
        if predictor.threshold is None or predictor.unit != unit:
            return columns
        chosen = (logits[:, 1] >= predictor.threshold["logit"]).astype(np.int64)
    names = np.array(predictor.classes, dtype=object)
    columns["predicted"] = pa.array(names[chosen], pa.string(), mask=mask)
    return columns


def finish(
    path_of: Callable[[int], Path], num_parts: int, out: Path, predictor: Predictor, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Join the parts, in order and one after the other: ``out`` last, since with it the work is done.

    Returns what ``Outcome`` says of it. Raises: DataError, a part is damaged; OSError, the disk is full.
    """

    def tables() -> Iterator[pa.Table]:
        return (_read_part(path_of(number)) for number in range(num_parts))

    bad: Counter[str] = Counter()
    left_out = scored = 0
    grouped = False
    for table in tables():
        status = table.column("status").to_pylist()
        reasons = table.column("reason").to_pylist()
        bad.update(reason for state, reason in zip(status, reasons, strict=True) if state == _BAD)
        left_out += status.count(_REFUSED)
        scored += status.count(None)
        grouped = grouped or "group" in table.column_names
    errors = patients = None
    if bad or left_out:
        errors = out.with_suffix(".errors.parquet")
        _write(errors, (_problems(table) for table in tables()))
    if grouped:
        patients = out.with_suffix(".patients.parquet")
        _write(patients, iter([patients_table(predictor, tables())]))
    outcome: dict[str, Any] = {
        "scored": scored,
        "bad": sum(bad.values()),
        "left_out": left_out,
        "reasons": dict(sorted(bad.items())),
        "errors": None if errors is None else errors.name,
        "patients": None if patients is None else patients.name,
    }
    told = {
        "identity": dict(identity),
        "outcome": outcome,
        "threshold": predictor.threshold,
        "thresholds": predictor.thresholds,
        "notes": list(predictor.notes),
    }
    _write(out, (_scored(table) for table in tables()), {"medtl": json.dumps(told)})
    return outcome | {"errors": errors, "patients": patients}


def patients_table(predictor: Predictor, tables: Iterator[pa.Table]) -> pa.Table:
    """One row per patient in order of their names: images scored, and the mean or the largest of their log-odds, as
    ``metrics.scores.by_patient``; images of nobody are left out."""
    totals: dict[str, tuple[int, NDArray[np.float64]]] = {}
    binary = predictor.task == "binary"
    take_largest = predictor.aggregate == "max"
    for table in map(_scored, tables):
        logits = np.stack([table.column(f"logit_{name}").to_numpy() for name in predictor.classes], axis=1)
        for group, row in zip(table.column("group").to_pylist(), logits, strict=True):
            if group is None:
                continue
            count, before = totals.get(group, (0, None))
            together = row if before is None else np.maximum(before, row) if take_largest else before + row
            totals[group] = (count + 1, together)
    groups = sorted(totals)
    counts = np.array([totals[group][0] for group in groups], np.int64)
    found = np.array([totals[group][1] for group in groups]).reshape(len(groups), len(predictor.classes))
    if not take_largest and groups:
        found = found / counts[:, None]
    if binary and groups:
        found[:, 0] = -found[:, 1]  # with max, the most suspicious image speaks for both classes
    columns = {"group": pa.array(groups, pa.string()), "num_images": pa.array(counts)}
    columns |= score_columns(predictor, found, np.ones(len(groups), bool), unit="patient")
    return pa.table(columns)


def _read_part(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: a part of the output is damaged or gone ({type(error).__name__}); delete it and run the command again"
        ) from None


def _scored(table: pa.Table) -> pa.Table:
    return table.filter(table.column("status").is_null()).drop_columns(["status", "reason"])


def _problems(table: pa.Table) -> pa.Table:
    own = [name for name in ("file", "row", "split", "key", "group") if name in table.column_names]
    return table.filter(table.column("status").is_valid()).select([*own, "status", "reason"])


def _write(path: Path, tables: Iterator[pa.Table], metadata: Mapping[str, str] | None = None) -> None:
    """The tables as one file, whole or not at all; one of them in memory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = None
    try:
        for table in tables:
            if writer is None:
                writer = pq.ParquetWriter(temporary, table.schema.with_metadata(dict(metadata or {})))
            writer.write_table(table.cast(writer.schema), row_group_size=_ROW_GROUP)
        if writer is not None:
            writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if writer is not None:
            writer.close()
        temporary.unlink(missing_ok=True)
