"""cells and lists of findings ─► label sets: several classes per image, each present, absent or unknown.

A label set is int8 [classes]: 1 present, 0 absent, -1 unknown; the index has null for unknown. Unknown is never taken for
absent. An image of which nothing is known is left out when packing, so every row of a set has a label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medtl_dist.errors import DataError, UserError

TASK = "multilabel"
UNKNOWN = -1
COUNTS = ("classes", "negatives", "unknown")  # the entries of dataset.json, by what of a class they count
LABEL_TYPE = pa.list_(pa.int8())
LabelSets = NDArray[np.int8]

_CELLS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0, "": UNKNOWN, "-1": UNKNOWN, "-1.0": UNKNOWN}


def parse_cells(columns: Mapping[str, Sequence[str]], source: Path) -> LabelSets:
    """int8 [rows, classes] of a column of cells per class: 1 or true, 0 or false, empty or -1 for unknown.

    Raises: UserError, other cells: which columns, and how many.
    """
    found = np.array([[_CELLS.get(cell.lower(), 2) for cell in cells] for cells in columns.values()], np.int8).T
    wrong = {name: int(count) for name, count in zip(columns, (found == 2).sum(axis=0), strict=True) if count}
    if wrong:
        told = ", ".join(f"{count} in column {name!r}" for name, count in wrong.items())
        raise UserError(f"{source} has cells that are no label ({told}): 1 or true, 0 or false, empty or -1 expected")
    return found


def parse_lists(cells: Sequence[str], separator: str, negative: str | None, source: Path) -> tuple[set[str], LabelSets]:
    """The classes named and int8 [rows, classes] in sorted order, of cells as ``Effusion|Mass``: what a cell names is
    present, the rest absent. ``negative`` alone in a cell: everything absent; an empty cell: everything unknown.

    Raises: UserError, ``negative`` in no cell, or beside others.
    """
    parts = [[part.strip() for part in cell.split(separator) if part.strip()] for cell in cells]
    if negative is not None and not any(negative in names for names in parts):
        raise UserError(f"--negative {negative}: no cell of the label column of {source} says so")
    mixed = sum(negative in names and len(set(names)) > 1 for names in parts)
    if mixed:
        raise UserError(f"{mixed} rows of {source} name {negative!r} (--negative) beside other labels: mend them")
    classes = {name for names in parts for name in names} - {negative}
    place = {name: number for number, name in enumerate(sorted(classes))}
    found = np.zeros((len(cells), len(classes)), np.int8)
    for row, names in enumerate(parts):
        if not names:
            found[row] = UNKNOWN
        for name in names:
            if name != negative:
                found[row, place[name]] = 1
    return classes, found


def as_texts(sets: LabelSets) -> list[str]:
    """Each row as a text, "" where nothing is known: for comparing rows of a source, not for people."""
    return ["" if (row == UNKNOWN).all() else ",".join(map(str, row.tolist())) for row in sets]


def as_list(labels: NDArray[np.int8]) -> list[int | None]:
    """One row as the index and the .json have it: null for unknown."""
    return [None if value == UNKNOWN else value for value in labels.tolist()]


def strata(sets: LabelSets) -> NDArray[np.int64]:
    """int64 [rows]: the rarest class (by its positives) that is present in each row, the number of classes where none is.

    By it images are dealt to splits, and patients drawn in a bootstrap: the rare classes are those that chance leaves out.
    """
    present = sets == 1
    num_classes = sets.shape[1]
    by_rarity = np.argsort(present.sum(axis=0), kind="stable")
    first = present[:, by_rarity].argmax(axis=1) if len(sets) else np.zeros(0, np.int64)
    return np.where(present.any(axis=1), by_rarity[first], num_classes).astype(np.int64)


def column_to_sets(column: pa.Array) -> LabelSets:
    """int8 [rows, classes] of an index's column ``label``. Raises: DataError, lists of unequal length or no labels."""
    values = column.flatten()
    rows = len(column)
    lengths = np.diff(np.from_dlpack(column.offsets))
    if rows == 0:
        return np.zeros((0, 0), np.int8)
    if (lengths != lengths[0]).any() or lengths[0] == 0:
        raise DataError("the index is damaged (label lists of unequal length): copy the set again or pack it again")
    sets = np.from_dlpack(values.fill_null(UNKNOWN)).reshape(rows, int(lengths[0]))
    return sets.astype(np.int8, copy=False)


def are_valid(sets: LabelSets, num_classes: int) -> bool:
    """Whether an index's rows are label sets of so many classes, with something known in each."""
    if len(sets) == 0:
        return True
    fits = sets.shape[1] == num_classes and bool(((sets >= UNKNOWN) & (sets <= 1)).all())
    return fits and not bool((sets == UNKNOWN).all(axis=1).any())


class Tally:
    """Counts the images of each class as they are written: of a label set its positives, negatives and unknowns."""

    def __init__(self, classes: Sequence[str] | None = None) -> None:
        """``classes``: of label sets; None: every image has one class, named as it is added."""
        self._classes = classes
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in (COUNTS if classes else COUNTS[:1])}

    def add(self, class_name: str | tuple[str, ...], label: int | Sequence[int | None]) -> None:
        if self._classes is None or isinstance(label, int):
            self._counts["classes"][str(class_name)] += 1
            return
        for name, value in zip(self._classes, label, strict=True):
            self._counts["unknown" if value is None else COUNTS[1 - value]][name] += 1

    def as_dict(self, order: Iterable[str] | None = None) -> dict[str, dict[str, int]]:
        """Entries of ``dataset.json``: every class of ``order``, else those that occurred, sorted."""
        names = list(order) if order is not None else None
        return {
            what: {name: count[name] for name in (names if names is not None else sorted(count))}
            for what, count in self._counts.items()
        }


def row_objection(label: Any, num_classes: int) -> str | None:
    """What is wrong with a row's label in an index, None for nothing; for ``verify``."""
    if not isinstance(label, list) or len(label) != num_classes:
        return f"has labels that are no list of {num_classes} classes"
    if any(value not in (0, 1, None) for value in label):
        return "has a label that is none of 0, 1, null"
    return "has no known label" if all(value is None for value in label) else None
