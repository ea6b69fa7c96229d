"""the user's list of duplicates that may stay ─► pairs with reasons. Every line needs its reason, and a key of the set."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from medtl_dist.data.shards import Dataset, read_shard_rows
from medtl_dist.errors import UserError

_EXAMPLE = "YAML `- keys: [KEY, KEY]` with `reason: …`, or CSV with columns key_a,key_b,reason"


def read_accepted(path: Path, dataset: Dataset) -> dict[frozenset[str], str]:
    """Pairs of hexadecimal keys to their reasons, from YAML or CSV (by the file's ending).

    Raises: UserError, a file of another shape, a missing reason, a key that the set does not have, a pair twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--accept {path} cannot be read ({reason}): expected {_EXAMPLE}") from None
    entries = _from_csv(path, text) if path.suffix.lower() == ".csv" else _from_yaml(path, text)
    known = _keys(dataset)
    accepted: dict[frozenset[str], str] = {}
    for number, (keys, reason) in enumerate(entries, 1):
        where = f"--accept {path}, entry {number}"
        pair = frozenset(key.strip().lower() for key in keys)
        if len(keys) != 2 or len(pair) != 2:
            raise UserError(f"{where}: two different keys expected ({_EXAMPLE})")
        if unknown := sorted(pair - known):
            raise UserError(
                f"{where}: {dataset.folder} has no image {unknown[0]}; keys are those that the audit prints"
            )
        if not reason.strip():
            raise UserError(f"{where}: no reason; say why this pair may stay, the reason is kept with the set")
        if pair in accepted:
            raise UserError(f"{where}: this pair was accepted before; once is enough")
        accepted[pair] = reason.strip()
    return accepted


def _from_csv(path: Path, text: str) -> list[tuple[list[str], str]]:
    rows = csv.DictReader(io.StringIO(text))
    if rows.fieldnames is None or sorted(rows.fieldnames) != ["key_a", "key_b", "reason"]:
        raise UserError(f"--accept {path}: columns key_a, key_b, reason expected, and no others")
    return [([row["key_a"] or "", row["key_b"] or ""], row["reason"] or "") for row in rows]


def _from_yaml(path: Path, text: str) -> list[tuple[list[str], str]]:
    import yaml

    try:
        # Everything stays text: a key of digits alone is no number.
        entries: Any = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        entries = None
    if not isinstance(entries, list):
        raise UserError(f"--accept {path} is no list: expected {_EXAMPLE}")
    found = []
    for number, entry in enumerate(entries, 1):
        keys = entry.get("keys") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not set(entry) <= {"keys", "reason"} or not isinstance(keys, list):
            raise UserError(f"--accept {path}, entry {number}: `keys` and `reason` expected, and no others")
        reason = entry.get("reason", "")
        found.append(([str(key) for key in keys], reason if isinstance(reason, str) else ""))
    return found


def _keys(dataset: Dataset) -> set[str]:
    return {
        key.hex()
        for split in dataset.splits
        for shard in dataset.shards(split)
        for key in read_shard_rows(dataset, shard, ["key"]).column("key").to_pylist()
    }
