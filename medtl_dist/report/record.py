"""run folder → Record: results.json, history.parquet and config.yaml, read and checked before anything is drawn."""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from medtl_dist.errors import DataError, UserError
from medtl_dist.report.schema import SCHEMA_VERSION, Results


@dataclass(frozen=True)
class Epoch:
    """One row of history.parquet; ``epoch`` from 0. A value that is not a finite number is None."""

    epoch: int
    train_loss: float | None
    val_loss: float | None
    val_auc: float | None
    val_average_precision: float | None
    lr: float | None
    best: bool


@dataclass(frozen=True)
class Record:
    """All that a report is made from."""

    results: Results
    history: tuple[Epoch, ...]
    config_yaml: str


def read_run(folder: Path) -> Record:
    """Reads a run folder.

    Raises:
        UserError: the folder doesn't exist, is no run folder, or its run has no results yet.
        DataError: a file of it is damaged, missing, or of another schema version.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the run folder that `medtl train` wrote")
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} is not a run folder (it has no config.yaml): give the folder that `medtl train` wrote"
        )
    if not (folder / "results.json").is_file():
        raise UserError(
            f"{folder} has no results.json: its run has not finished. Go on with "
            f"`medtl train --config {folder / 'config.yaml'} --run-dir {folder} --resume`, then make the report"
        )
    return Record(
        _read_results(folder / "results.json"), _read_history(folder / "history.parquet"), _read_config(folder)
    )


def clean(value: Any) -> Any:
    """The same JSON value with what can't be shown safely (control, surrogate, text-direction override) as U+FFFD."""
    if isinstance(value, str):
        return "".join("\ufffd" if _is_unshowable(character) else character for character in value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return value


def _is_unshowable(character: str) -> bool:
    # Cf also holds joiners that real names need; of it only the overrides can make a text read as another.
    return (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t") or (
        "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    )


def _read_results(file: Path) -> Results:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    remedy = "restore the file, or write it again with `medtl evaluate`"
    try:
        raw = json.loads(file.read_bytes(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({error}): {remedy}") from error
    if not isinstance(raw, dict):
        raise DataError(f"{file} is damaged (an object was expected): {remedy}")
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{file} has schema version {version!r}; this medtl reads version {SCHEMA_VERSION}: "
            "use the medtl that wrote it (provenance.versions names it)"
        )
    try:
        return Results.model_validate(clean(raw))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise DataError(f"{file} is damaged ({place}: {first['msg']}): {remedy}") from error


def _read_history(file: Path) -> tuple[Epoch, ...]:
    names = ["epoch", "train_loss", "val_loss", "val_auc"]
    try:
        table = pq.read_table(file)
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing: restore it, or train again") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} is damaged ({str(error).splitlines()[0]}): restore it, or train again") from error
    absent = [name for name in names if name not in table.column_names]
    if absent:
        raise DataError(f"{file} is damaged (no column {', '.join(absent)}): restore it, or train again")
    try:
        rows = [_epoch(row) for row in table.to_pylist()]
    except (TypeError, ValueError) as error:
        raise DataError(f"{file} is damaged ({error}): restore it, or train again") from error
    return tuple(sorted({row.epoch: row for row in rows}.values(), key=lambda row: row.epoch))


def _epoch(row: dict[str, Any]) -> Epoch:
    def number(name: str) -> float | None:
        value = row.get(name)
        return float(value) if value is not None and math.isfinite(value) else None

    return Epoch(
        epoch=int(row["epoch"]),
        train_loss=number("train_loss"),
        val_loss=number("val_loss"),
        val_auc=number("val_auc"),
        val_average_precision=number("val_average_precision"),
        lr=number("lr"),
        best=bool(row.get("best")),
    )


def _read_config(folder: Path) -> str:
    file = folder / "config.yaml"
    try:
        return clean(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is damaged ({error}): restore it") from error
