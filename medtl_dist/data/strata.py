"""shards ─► strata: how many samples of each class or domain every shard has, for weighted sampling.

``dataset.json`` has the counts; only for sets that lack them is the index read, one shard at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from medtl_dist.data.plan import Weighting, weigh
from medtl_dist.data.shards import Dataset, are_counts, read_shard_rows
from medtl_dist.errors import DataError, UserError

UNNAMED = ""  # the domain of samples without one


@dataclass(frozen=True)
class Strata:
    """``by``: ``class | domain``; ``names``: of the strata; ``weighting``: how often each appears in an epoch."""

    by: str
    names: tuple[str, ...]
    weighting: Weighting

    @property
    def column(self) -> str:
        """The index column that tells a sample's stratum."""
        return "label" if self.by == "class" else "domain"

    def of_rows(self, column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
        """int64 [rows], the stratum of each sample from its ``column`` of the index.

        Raises: DataError, a value that ``dataset.json`` does not list.
        """
        if self.by == "class":
            codes = np.from_dlpack(column.combine_chunks()).astype(np.int64, copy=False)
        else:
            place = {name: code for code, name in enumerate(self.names)}
            codes = np.array([place.get(name or UNNAMED, -1) for name in column.to_pylist()], np.int64)
        if ((codes < 0) | (codes >= len(self.names))).any():
            raise DataError(f"the index has a {self.by} that dataset.json does not list: copy the set or pack it again")
        return codes


def strata_of(dataset: Dataset, split: str, by: str, weights: Mapping[str, float] | None = None) -> Strata:
    """The strata of a split and how often each appears in an epoch.

    Args:
        by: ``class | domain``.
        weights: name of a class or domain to how often each of its samples appears, 1 where not named; None: balanced.

    Raises:
        UserError: a name that the set lacks, a weight out of range, a set without domains.
        DataError: a damaged index.
    """
    if by == "class" and dataset.task == "multilabel":
        raise UserError(
            f"data.sampling = class: an image of {dataset.folder} may have several classes; use domain or natural, "
            "and train.class_weights = balanced against rare classes"
        )
    names = _names(dataset, split, by)
    if by == "domain" and names == (UNNAMED,):
        raise UserError(f"data.sampling = domain: split {split!r} of {dataset.folder} has no domains; use class")
    unknown = sorted(set(weights or ()) - set(names))
    if unknown:
        raise UserError(
            f"data.sampling_weights names {', '.join(unknown)}, which split {split!r} of {dataset.folder} lacks; "
            f"it has: {', '.join(names)}"
        )
    counts = np.array([_shard_counts(dataset, split, place, by, names) for place in range(_num_shards(dataset, split))])
    asked = None if weights is None else [float(weights.get(name, 1.0)) for name in names]
    return Strata(by, names, weigh(counts.reshape(-1, len(names)), asked))


def _num_shards(dataset: Dataset, split: str) -> int:
    return len(dataset.shards(split))


def _names(dataset: Dataset, split: str, by: str) -> tuple[str, ...]:
    if by == "class":
        return dataset.classes
    entry = dataset.info["splits"][split]
    if not are_counts(entry.get("domains", {})):
        raise DataError(f"{dataset.folder}: split {split} has no counts of its domains: copy the set or pack it again")
    named = sorted(entry.get("domains", {}))
    some_unnamed = sum(entry.get("domains", {}).values()) < entry["samples"]
    return (*([UNNAMED] if some_unnamed else []), *named)


def _shard_counts(dataset: Dataset, split: str, place: int, by: str, names: Sequence[str]) -> list[int]:
    listed = dataset.info["splits"][split]["shards"][place]
    field = "classes" if by == "class" else "domains"
    shard = dataset.shards(split)[place]
    if field in listed:
        found = Counter(listed[field])
        if by == "domain" and UNNAMED in names:
            found[UNNAMED] = shard.samples - found.total()
    else:
        column = "label" if by == "class" else "domain"
        values = read_shard_rows(dataset, shard, [column]).column(column).to_pylist()
        found = Counter(names[value] if by == "class" else value or UNNAMED for value in values)
    if found.total() != shard.samples or not set(found) <= set(names):
        raise DataError(f"{dataset.folder}: the {field} of {shard.name} do not add up: copy the set or pack it again")
    return [found[name] for name in names]
