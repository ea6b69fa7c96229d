"""index.parquet of a set ─► what is wrong with it as a whole: the file, keys that repeat, groups in several splits."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from medtl_dist.data.index_footer import footer_of_one, spans_of
from medtl_dist.data.shard_check import HASH, Fault, open_file, sha256_of
from medtl_dist.data.shards import DATASET_FILE, INDEX_FIELDS, INDEX_FILE, Dataset, read_shard_rows
from medtl_dist.data.tars import Readable
from medtl_dist.errors import DataError

_AT_ONCE = 2**23  # keys compared in one pass over the index


def index_faults(dataset: Dataset) -> Iterator[Fault]:
    """Its length, checksum and footer. Raises: UserError, Interrupted: see ``open_file``."""
    expected = dataset.info["index"]
    try:
        file, length = open_file(dataset, INDEX_FILE)
        with file:
            if length != expected["bytes"]:
                yield Fault("length", INDEX_FILE, f"is {length} bytes long, {expected['bytes']} in {DATASET_FILE}")
            if sha256_of(file) != expected["sha256"]:
                yield Fault("checksum", INDEX_FILE, f"its sha256 differs from {DATASET_FILE}'s")
            yield from _footer_faults(dataset, file, length)
    except FileNotFoundError:
        yield Fault("missing", INDEX_FILE, "is missing")
    except (OSError, ValueError, pa.ArrowException, DataError) as error:
        yield Fault("index", INDEX_FILE, f"cannot be read ({type(error).__name__})")


def _footer_faults(dataset: Dataset, file: Readable, length: int) -> Iterator[Fault]:
    """Of 10^5 row groups Arrow would make a gigabyte, so they are counted and one of them is parsed."""
    footer_bytes = struct.unpack("<I", _read(file, length - 8, length)[:4])[0] + 8
    spans = spans_of(_read(file, length - footer_bytes, length), length)
    num_shards = sum(len(dataset.shards(split)) for split in dataset.splits)
    if len(spans.row_groups) != num_shards:
        yield Fault("index", INDEX_FILE, f"has {len(spans.row_groups)} row groups for {num_shards} shards")
    elif dataset.index_spans not in (None, spans):
        yield Fault("index", DATASET_FILE, f"tells other places of the row groups than {INDEX_FILE} has")
    if spans.row_groups:
        parts = (_read(file, *span) for span in (spans.before, spans.row_groups[0], spans.after))
        names = footer_of_one(*parts).schema.to_arrow_schema().names
        if names[: len(INDEX_FIELDS)] != [field.name for field in INDEX_FIELDS]:
            yield Fault("index", INDEX_FILE, "has other columns than the format's")


def _read(file: Readable, start: int, stop: int) -> bytes:
    if not 0 <= start <= stop:
        raise ValueError("a Parquet footer longer than its file")
    file.seek(start)
    return file.read(stop - start)


def compare_identities(dataset: Dataset, faults: list[Fault]) -> dict[str, int]:
    """Keys that occur twice and groups in more than one split, as faults; returns the number of groups per split.

    In as many passes over two columns of the index as keep memory bounded: each takes its share of the hashes.
    """
    num_groups: Counter[str] = Counter()
    total = sum(entry["samples"] for entry in dataset.info["splits"].values())
    passes = max(1, -(-total // _AT_ONCE))
    for share in range(passes):
        keys: list[np.ndarray] = []
        groups: list[np.ndarray] = []
        for number, split in enumerate(dataset.splits):
            for shard in dataset.shards(split):
                table = read_shard_rows(dataset, shard, ["key", "group"])
                keys.append(_share(_hashes(table["key"]), share, passes))
                found = np.unique(_share(_hashes(table["group"].unique()), share, passes), axis=0)
                groups.append(np.column_stack([found, np.full(len(found), number, np.uint64)]))
        faults += [
            Fault("key", INDEX_FILE, "its key occurs more than once", _unhash(row))
            for row in _repeated(_joined(keys, 2))
        ]
        placed = np.unique(_joined(groups, 3), axis=0)
        for number, count in zip(*np.unique(placed[:, 2], return_counts=True), strict=True):
            num_groups[dataset.splits[int(number)]] += int(count)
        leaking = {tuple(row) for row in _repeated(placed[:, :2]).tolist()}
        if leaking:
            faults += _leaks(dataset, leaking)
    return dict(num_groups)


def _hashes(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """uint64 [n, 2]: 16-byte keys as they are, texts hashed to 16 bytes."""
    values = column.drop_null().to_pylist()
    if values and isinstance(values[0], str):
        values = [hashlib.blake2b(value.encode(), digest_size=16).digest() for value in values]
    return np.frombuffer(b"".join(values), ">u8").reshape(-1, 2).astype(np.uint64)


def _share(hashes: np.ndarray, share: int, passes: int) -> np.ndarray:
    return hashes[hashes[:, 1] % np.uint64(passes) == share]


def _joined(parts: list[np.ndarray], width: int) -> np.ndarray:
    return np.concatenate([np.empty((0, width), np.uint64), *parts])


def _repeated(rows: np.ndarray) -> np.ndarray:
    """Each row of ``rows`` (uint64 [n, 2]) that occurs more than once, once."""
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    same = (rows[1:] == rows[:-1]).all(axis=1)
    return np.unique(rows[1:][same], axis=0)


def _unhash(row: np.ndarray) -> str:
    return row.astype(">u8").tobytes().hex()


def _leaks(dataset: Dataset, leaking: set[tuple[int, ...]]) -> Iterator[Fault]:
    """Names the groups, by another pass: most sets never need it."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for split in dataset.splits:
        for shard in dataset.shards(split):
            names = read_shard_rows(dataset, shard, ["group"])["group"].unique().drop_null()
            for name, row in zip(names.to_pylist(), _hashes(names).tolist(), strict=True):
                if tuple(row) in leaking and split not in places[name]:
                    places[name].append(split)
    for name, splits in places.items():
        told = name if HASH.fullmatch(name) else "(no hash, so not told)"
        yield Fault("group", INDEX_FILE, f"group {told} is in more than one split ({', '.join(splits)})")
