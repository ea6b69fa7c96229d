"""listing ─► manifest: keys, groups, classes, splits, exclusions and the packing order of every image of a source.

Everything here is a function of names, labels and the seed: the order of the source's entries, the machine and the
number of workers have no say.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtl_dist.data import identity, kept_columns, label_sets, split
from medtl_dist.data.label_sets import LabelSets
from medtl_dist.data.shards import SPLITS
from medtl_dist.data.sources import Listing
from medtl_dist.errors import LeakageError, UserError

MAX_CLASSES = 1000
SMALL_CELL = 5


@dataclass(frozen=True)
class Identities:
    """Per entry of a listing: ``keys`` (16 bytes), ``groups`` (32 hexadecimal digits) and ``group_names``, the raw
    group that only the linkage may tell (the image itself where ``source`` is ``none``)."""

    keys: list[bytes]
    groups: list[str]
    group_names: list[str]
    source: str


@dataclass(frozen=True)
class Manifest:
    """What will be packed. ``labels``: int64 per entry, -1 without a label, or label sets int8 [entries, classes];
    ``splits``: per entry, None if it was left out before the draw; ``excluded``: entry to reason; ``order``: per split its
    entries in packing order."""

    listing: Listing
    identities: Identities
    classes: tuple[str, ...]
    positive_class: str | None
    labels: NDArray[np.int64] | LabelSets
    splits: list[str | None]
    excluded: dict[int, str]
    order: dict[str, list[int]]
    split_source: dict[str, Any]
    notes: list[str]

    @property
    def task(self) -> str:
        if self.listing.label_sets is not None:
            return label_sets.TASK
        return "binary" if len(self.classes) == 2 else "multiclass"


def identify(listing: Listing, secret: bytes) -> Identities:
    """Key every image by its path (and row), and name its group: one column, a composite, or columns joined."""
    rows = ["" if row < 0 else str(row) for row in listing.rows]
    if listing.kind == "medmnist":  # a row is counted within its split's array
        rows = [f"{name}/{row}" for name, row in zip(listing.splits, rows, strict=True)]
    keys = [identity.image_key(secret, name, row) for name, row in zip(listing.names, rows, strict=True)]
    if not listing.units:
        names = [f"{name}\0{row}" for name, row in zip(listing.names, rows, strict=True)]
        return Identities(keys, [key.hex() for key in keys], names, "none")
    if len(listing.units) == 1:
        [(option, column)] = listing.units.items()
        names = ["\0".join(values or ()) for values in column]
        source = f"column {option}"
    else:
        units = [
            [
                "\0".join((option, *values))
                for option, values in zip(listing.units, row, strict=True)
                if values is not None
            ]
            for row in zip(*listing.units.values(), strict=True)
        ]
        names = identity.joined_groups(units)
        source = f"columns {', '.join(listing.units)} joined"
    hashed = {name: identity.group_key(secret, *name.split("\0")) for name in set(names)}
    return Identities(keys, [hashed[name] for name in names], names, source)


def build_manifest(
    listing: Listing,
    identities: Identities,
    *,
    missing: Iterable[int] = (),
    positive: str | None = None,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    split_column: str | None = None,
) -> Manifest:
    """Leave out what cannot be used, refuse what leaks, complete the splits and draw the packing order.

    Args:
        missing: entries whose file is not there, already allowed to be left out.
        positive: class of label 1 of two classes; None: the last in sorted order, with a note.
        fractions: shares of train, val, test where splits have to be drawn.
        split_column: name of ``--split-col`` for the remedy of a leak.

    Raises:
        UserError: fewer than two classes, too many to be classes, an unknown ``positive``, contradictory rows.
        LeakageError: a group, or one image, in more than one given split.
    """
    excluded = {row: "empty label" for row, label in enumerate(listing.labels) if not label}
    excluded |= listing.bad | listing.refused
    excluded |= _repeated(listing, identities, excluded)
    _refuse_leaks(listing, identities, excluded, split_column)
    excluded |= {row: "missing file" for row in missing if row not in excluded}
    included = [row for row in range(len(listing)) if row not in excluded]

    notes = list(listing.notes)
    if listing.label_sets is not None:
        _check_label_sets(listing, listing.label_sets[included], positive)
        classes, positive_class, labels = tuple(listing.classes), None, listing.label_sets
        strata = label_sets.strata(listing.label_sets[included])
    else:
        classes, positive_class = _classes(listing, included, positive, notes)
        index = {name: label for label, name in enumerate(classes)}
        labels = np.array([index.get(name, -1) for name in listing.labels], dtype=np.int64)
        strata = labels[included]
    assignment = split.complete(
        [listing.splits[row] for row in included],
        [identities.group_names[row] for row in included],
        strata,
        fractions,
        seed,
        unit="by image" if identities.source == "none" else "by group",
    )
    splits: list[str | None] = list(listing.splits)
    by_split: defaultdict[str, list[int]] = defaultdict(list)
    for row, name in zip(included, assignment.splits, strict=True):
        splits[row] = name
        by_split[name].append(row)
    order = {
        name: [rows[i] for i in split.shuffled([identities.keys[row] for row in rows], seed)]
        for name, rows in by_split.items()
    }
    return Manifest(
        listing=listing,
        identities=identities,
        classes=classes,
        positive_class=positive_class,
        labels=labels,
        splits=splits,
        excluded=excluded,
        order=order,
        split_source={
            "method": assignment.method,
            "seed": seed,
            "fractions": list(fractions) if assignment.drawn else None,
        },
        notes=notes,
    )


def _repeated(listing: Listing, identities: Identities, excluded: Mapping[int, str]) -> dict[int, str]:
    """Entries that say again what an earlier one said. Contradictions are refused: nobody can know which is right."""
    first: dict[tuple[str, int], int] = {}
    repeated: dict[int, str] = {}
    contradicting: list[int] = []
    leaking: list[int] = []
    for row, image in enumerate(zip(listing.names, listing.rows, strict=True)):
        if listing.kind == "medmnist" or row in excluded:
            continue
        earlier = first.setdefault(image, row)
        if earlier == row:
            continue
        if listing.splits[earlier] != listing.splits[row]:
            leaking.append(row)
        elif _facts(listing, earlier) != _facts(listing, row):
            contradicting.append(row)
        repeated[row] = "listed more than once"
    if leaking:
        raise LeakageError(
            f"{len(leaking)} images are listed in more than one split (for example {_key(identities, leaking)}): "
            "an image may be in one split only; mend the table, or leave --split-col out to draw new splits"
        )
    if contradicting:
        raise UserError(
            f"{len(contradicting)} rows name an image again with another label, group, domain or kept value "
            f"(for example {_key(identities, contradicting)}): one row per image expected"
        )
    return repeated


def _facts(listing: Listing, row: int) -> tuple[Any, ...]:
    units = tuple(column[row] for column in listing.units.values())
    kept = () if listing.kept is None else tuple(str(value) for value in listing.kept.slice(row, 1).to_pylist())
    return (listing.labels[row], listing.domains[row], units, kept)


def _key(identities: Identities, rows: list[int]) -> str:
    return f"key {min(identities.keys[row].hex() for row in rows)}"


def _refuse_leaks(
    listing: Listing, identities: Identities, excluded: Mapping[int, str], split_column: str | None
) -> None:
    rows = [row for row in range(len(listing)) if row not in excluded]
    leaks = split.straddling([listing.splits[row] for row in rows], [identities.groups[row] for row in rows])
    if not leaks:
        return
    pairs = Counter(" and ".join(name for name in SPLITS if name in splits) for splits in leaks.values())
    total = len({identities.groups[row] for row in rows})
    shown = ", ".join(list(leaks)[:3]) + (" …" if len(leaks) > 3 else "")
    options = list(listing.units)
    scoped = " ".join(f"--group-col {split_column or 'SPLIT'}+{option}" for option in options)
    raise LeakageError(
        f"{len(leaks)} of {total} groups ({identities.source}) are in more than one given split "
        f"({', '.join(f'{count} in {pair}' for pair, count in sorted(pairs.items()))}): {shown}. "
        f"If the ids start again in each split, they are other patients: {scoped}. If they are the same patients, "
        "mend the split column, or leave --split-col out to draw splits by group. linkage.parquet in the set's private "
        "folder names the groups"
    )


def _classes(
    listing: Listing, included: list[int], positive: str | None, notes: list[str]
) -> tuple[tuple[str, ...], str | None]:
    classes = list(listing.classes)
    present = {listing.labels[row] for row in included}
    if len(classes) > MAX_CLASSES or (len(classes) > 20 and len(classes) > len(included) / 2):
        raise UserError(
            f"{len(classes)} different labels among {len(included)} images: these are no classes; is --label-col right?"
        )
    if len(present) < 2:
        found = f"all of class {next(iter(present))!r}" if present else "none with a label"
        raise UserError(f"{len(included)} images, {found}: at least two classes with images are needed")
    if len(classes) != 2:
        if positive is not None:
            raise UserError(f"--positive {positive}: only two classes have a positive one; these are {len(classes)}")
        return tuple(classes), None
    if positive is None:
        positive = classes[1]
        notes.append(f"positive class {positive!r}: the last of two in sorted order (--positive names another)")
    elif positive not in classes:
        raise UserError(f"--positive {positive}: the classes are {', '.join(classes)}")
    negative = classes[1 - classes.index(positive)]
    return (negative, positive), positive


def _check_label_sets(listing: Listing, sets: LabelSets, positive: str | None) -> None:
    if positive is not None:
        raise UserError(
            f"--positive {positive}: of several labels an image each class is positive or negative by itself"
        )
    if not 2 <= len(listing.classes) <= MAX_CLASSES:
        raise UserError(f"{len(listing.classes)} classes among {len(sets)} images: 2 to {MAX_CLASSES} expected")
    if not ((sets == 1).any(axis=0) & (sets == 0).any(axis=0)).any():
        raise UserError(
            f"{len(sets)} images: no class has both an image with it and one without, so nothing can be learned"
        )


def exclusion_counts(manifest: Manifest, excluded: Mapping[int, str]) -> list[dict[str, Any]]:
    """Exclusions by reason × split × class for ``dataset.json``, with the groups they touch; null where unknown."""
    samples: Counter[tuple[str, str | None, str | None]] = Counter()
    groups: defaultdict[tuple[str, str | None, str | None], set[str]] = defaultdict(set)
    for row, reason in excluded.items():
        one_label = manifest.listing.label_sets is None
        cell = (reason, manifest.splits[row], manifest.listing.labels[row] or None if one_label else None)
        samples[cell] += 1
        groups[cell].add(manifest.identities.groups[row])
    return [
        {"reason": cell[0], "split": cell[1], "class": cell[2], "samples": samples[cell], "groups": len(groups[cell])}
        for cell in sorted(samples, key=lambda cell: tuple(value or "" for value in cell))
    ]


def fact_counts(manifest: Manifest, excluded: Mapping[int, str]) -> dict[str, dict[str, dict[str, int]]]:
    """The source's facts of the packed images for ``dataset.json``: fact × value × class."""
    packed = [row for row in range(len(manifest.listing)) if row not in excluded]
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for fact, values in manifest.listing.counted.items():
        cells = Counter((values[row], manifest.listing.labels[row]) for row in packed)
        counts[fact] = {value: {} for value in sorted({value for value, _ in cells})}
        for (value, label), count in sorted(cells.items()):
            counts[fact][value][label] = count
    return counts


def small_cells(manifest: Manifest, excluded: Mapping[int, str]) -> str | None:
    """A caution if combinations of kept values are shared by so few patients that they may single one out."""
    kept = manifest.listing.kept
    if kept is None or not kept.column_names:
        return None
    patients: defaultdict[tuple[Any, ...], set[str]] = defaultdict(set)
    for row, values in enumerate(zip(*(column.to_pylist() for column in kept.columns), strict=True)):
        if row not in excluded:
            patients[values].add(manifest.identities.groups[row])
    small = [groups for groups in patients.values() if len(groups) < SMALL_CELL]
    if not small:
        return None
    return (
        f"the kept {', '.join(kept.column_names)} may single patients out: {len(small)} of {len(patients)} combinations of "
        f"their values are shared by fewer than {SMALL_CELL} patients ({len(set().union(*small))} patients in all)"
    )


def cautions(
    manifest: Manifest, splits: Mapping[str, Mapping[str, Any]], excluded: Mapping[int, str] | None = None
) -> list[str]:
    """What to know before trusting numbers from this set. ``splits``: the counts of ``dataset.json`` by split."""
    found = [*manifest.listing.cautions, *kept_columns.cautions(manifest.listing.kept)]
    if manifest.listing.kind == "dicom" and (caution := small_cells(manifest, excluded or manifest.excluded)):
        found.append(caution)
    if manifest.identities.source == "none":
        found.append("patients are unknown (group_source none): one patient's images may be in more than one split")
    sizes = Counter(manifest.identities.groups[row] for rows in manifest.order.values() for row in rows)
    return [*found, *cautions_of_counts(splits, sizes)]


def cautions_of_counts(splits: Mapping[str, Mapping[str, Any]], group_sizes: Mapping[str, int]) -> list[str]:
    """What the counts alone tell: of ``dataset.json`` by split, and of the images of each group."""
    found: list[str] = []
    for name in SPLITS:
        if name not in splits:
            found.append(f"there is no {name} split")
            continue
        for label, count in splits[name]["classes"].items():
            if count == 0:
                found.append(f"split {name} has no image of class {label!r}")
            elif splits[name].get("negatives", {}).get(label, 1) == 0:
                found.append(f"split {name} has no image known to be without class {label!r}")
    total, largest = sum(group_sizes.values()), max(group_sizes.values(), default=0)
    if largest >= 10 and largest > total / 4:
        found.append(f"one group has {largest} of {total} images: is its id a placeholder such as 'unknown'?")
    return found
