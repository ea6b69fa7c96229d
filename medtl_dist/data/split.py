"""manifest ─► splits: every image in one of train, val, test; every group (patient) on one side only.

Pure functions of names, labels and a seed; they import neither torch nor webdataset. Nothing depends on the order of
the rows.

What is given is kept. Rows without a split follow their group where it has one, else they join train. With no split
given at all the groups are divided by the fractions. A missing val is taken from train, by group; a missing test stays
missing, because a test set carved out of training data today would not be the one that others report on.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medtl_dist.errors import UserError

SPLIT_ALIASES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Assignment:
    """``splits``: per row ``train | val | test``. ``method``: how they came about, for ``dataset.json``. ``drawn``:
    whether the fractions and the seed had a say."""

    splits: list[str]
    method: str
    drawn: bool


def parse_fractions(text: str) -> tuple[float, float, float]:
    """``"0.7,0.15,0.15"`` to the shares of train, val, test. Raises: UserError unless three numbers from 0 to 1 that
    add up to 1."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= value <= 1 for value in values) or abs(sum(values) - 1) > 1e-6:
        raise UserError(f"--split {text}: three shares of train, val, test that add up to 1 expected, as 0.7,0.15,0.15")
    return (values[0], values[1], values[2])


def straddling(given: Sequence[str | None], groups: Sequence[str]) -> dict[str, set[str]]:
    """The groups that the given splits place in more than one split, with these splits, sorted by group."""
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for split, group in zip(given, groups, strict=True):
        if split is not None:
            seen[group].add(split)
    return {group: seen[group] for group in sorted(seen) if len(seen[group]) > 1}


def complete(
    given: Sequence[str | None],
    groups: Sequence[str],
    labels: NDArray[np.int64],
    fractions: tuple[float, float, float],
    seed: int,
    *,
    unit: str = "by group",
) -> Assignment:
    """Keep the given splits and fill in what is missing, as the module's docstring says.

    Args:
        given: per row its given split, or None. No group may straddle two given splits (see ``straddling``).
        groups: per row its group.
        labels: int64 [rows], from 0.
        fractions: shares of train, val, test; of a missing val the share is ``val / (train + val)`` of train.
        seed: of the draw.
        unit: ``by group``, or ``by image`` where nobody knows the groups: a word for ``method`` only.
    """
    train, val, test = fractions
    if all(split is None for split in given):
        drawn = by_group(groups, labels, {"train": train, "val": val, "test": test}, seed)
        return Assignment([drawn[group] for group in groups], unit, True)

    given_to = {group: split for group, split in zip(groups, given, strict=True) if split is not None}
    splits = [split or given_to.get(group, "train") for group, split in zip(groups, given, strict=True)]
    method = "given" if all(split is not None for split in given) else "given, the others to their group's or train"
    if "val" in splits or "train" not in splits or val == 0 or train == 0:
        return Assignment(splits, method, False)
    rows = [row for row, split in enumerate(splits) if split == "train"]
    shares = {"train": train / (train + val), "val": val / (train + val)}
    drawn = by_group([groups[row] for row in rows], labels[rows], shares, seed)
    for row in rows:
        splits[row] = drawn[groups[row]]
    return Assignment(splits, f"{method}, val from train {unit}", True)


def by_group(
    groups: Sequence[str], labels: NDArray[np.int64], fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Divide groups among the splits, so that each split's share of every class comes near its fraction.

    Largest groups first, equals in an order drawn from the seed, each to the split that is furthest behind its wish,
    in proportion to the wish and weighted over the classes by rarity (Webster's apportionment, class by class). Groups
    of every size so reach every split. Returns group to split; a split of fraction 0 gets none.
    """
    names = [name for name, fraction in fractions.items() if fraction > 0]
    unique, inverse = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    _, classes = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(unique), int(classes.max()) + 1 if len(classes) else 0))
    np.add.at(counts, (inverse, classes), 1)
    totals = counts.sum(axis=0)
    wish = np.outer([fractions[name] for name in names], totals)
    have = np.zeros_like(wish)
    drawn: dict[str, str] = {}
    sizes = counts.sum(axis=1)
    for position in sorted(range(len(unique)), key=lambda i: (-sizes[i], _draw(seed, unique[i]), unique[i])):
        count = counts[position]
        behind = (1 - (have + count / 2) / wish) @ (count / totals)
        # Between equals, the split that is behind over all classes: else the odd image of each class goes to one split.
        behind += 1e-6 * (1 - (have.sum(axis=1) + sizes[position] / 2) / wish.sum(axis=1))
        best = int(np.argmax(behind))
        have[best] += count
        drawn[unique[position]] = names[best]
    return drawn


def shuffled(keys: Sequence[bytes], seed: int) -> list[int]:
    """Positions of the keys in an order drawn from the seed and the keys alone."""
    return sorted(range(len(keys)), key=lambda i: (_draw(seed, keys[i]), keys[i]))


def _draw(seed: int, name: str | bytes) -> bytes:
    data = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest()
