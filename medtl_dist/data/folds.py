"""samples outside test ─► folds: every patient in one fold, every class spread over all of them, anew for each repeat.

Pure functions of names, classes and a seed; nothing depends on the order of the rows.

A patient counts in the stratum of its rarest class (rarest by patients): the rare classes are those that chance would leave
out of a fold. Within a stratum patients are dealt in rounds: in an order drawn from the seed, one to each fold, the largest of
the round to the fold that has fewest images. So folds differ by at most one patient of a stratum, and by no more of its images
than its largest patient has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.split import shuffled
from medtl_dist.errors import UserError

MAX_FOLDS = 100
MAX_REPEATS = 100
INNER_FOLDS = 5  # of them one is the inner val


@dataclass(frozen=True)
class Settings:
    """How to cross-validate. ``epochs_from``: ``fixed``, the config's; ``inner``, the best on an inner val."""

    folds: int = 5
    repeats: int = 1
    epochs_from: Literal["fixed", "inner"] = "fixed"


def check_settings(settings: Settings, early_stop_epochs: int | None) -> None:
    """What can be told without the set. Raises: UserError."""
    if settings.epochs_from == "fixed" and early_stop_epochs is not None:
        raise UserError(
            f"train.early_stop_epochs = {early_stop_epochs}: with fixed epochs nothing is held back to stop by; "
            "give --epochs-from inner, or set it to null."
        )
    if not 2 <= settings.folds <= MAX_FOLDS:
        raise UserError(f"--folds {settings.folds}: 2 to {MAX_FOLDS} folds expected")
    if not 1 <= settings.repeats <= MAX_REPEATS:
        raise UserError(f"--repeats {settings.repeats}: 1 to {MAX_REPEATS} expected")


def check_folds(groups: Sequence[str], has: NDArray[np.bool_], names: Sequence[str], num_folds: int) -> None:
    """Whether these samples can be dealt to so many folds.

    Args:
        groups: per row its patient.
        has: bool [rows, classes], whether a row is of a class.
        names: of the classes, for the message.

    Raises:
        UserError: too few or too many folds, or fewer patients than folds, of a class or in all.
    """
    _, counts, _ = _patients(groups, has)
    patients = len(counts)
    if not 2 <= num_folds <= MAX_FOLDS:
        raise UserError(f"--folds {num_folds}: 2 to {MAX_FOLDS} folds expected")
    if patients < num_folds:
        raise UserError(
            f"--folds {num_folds}: only {patients} patients outside test; a patient is never split, so give at most as many "
            "folds as patients"
        )
    of_class = counts.sum(axis=0)
    few = [(int(count), name) for name, count in zip(names, of_class, strict=True) if 0 < count < num_folds]
    if few:
        least, name = min(few)
        told = ", ".join(f"{name!r} has {count}" for count, name in sorted(few))
        remedy = f"give --folds {least} or fewer" if least > 1 else f"pack the set without class {name!r}, or with more"
        raise UserError(
            f"--folds {num_folds}: each fold needs a patient of each class, and of the {patients} patients outside test "
            f"{told}: {remedy}"
        )
    if (of_class > 0).sum() < 2:
        raise UserError(f"--folds {num_folds}: the {patients} patients outside test are all of one class")


def deal_folds(groups: Sequence[str], has: NDArray[np.bool_], num_folds: int, seed: int) -> NDArray[np.int64]:
    """Per row its fold, from 0, as the module's docstring says. ``has``: bool [rows, classes]; each row has one at least."""
    names, of_patient, codes = _patients(groups, has)
    sizes = np.bincount(codes, minlength=len(names))
    by_rarity = np.argsort(of_patient.sum(axis=0), kind="stable")
    stratum = of_patient[:, by_rarity].argmax(axis=1)
    drawn = shuffled([name.encode("utf-8", "surrogateescape") for name in names], seed)
    fold, patients = np.zeros(len(names), np.int64), np.zeros(num_folds, np.int64)
    for position in range(len(by_rarity)):
        members = [patient for patient in drawn if stratum[patient] == position]
        # Between equals another order for each stratum, so that which of them meet in a fold is up to the seed.
        rank = np.argsort(
            shuffled([f"fold {number} of stratum {position}".encode() for number in range(num_folds)], seed)
        )
        own = np.zeros(num_folds, np.int64)
        for start in range(0, len(members), num_folds):
            dealt = sorted(members[start : start + num_folds], key=lambda patient: -sizes[patient])
            order = np.lexsort((rank, patients, own))  # fewest images of the stratum first
            for patient, number in zip(dealt, order, strict=False):
                fold[patient] = number
                own[number] += sizes[patient]
                patients[number] += 1
    return fold[codes]


def inner_val(groups: Sequence[str], has: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """Per row of a fold's training samples whether it is held back to choose the epoch on: about a fifth, by patient, every
    class on both sides.

    Raises:
        UserError: a class with one patient only.
    """
    counts = _patients(groups, has)[1].sum(axis=0)
    least = int(counts[counts > 0].min())
    if least < 2:
        raise UserError(
            "--epochs-from inner: outside a held-out fold one class has a single patient, who can't be in train and in the "
            "inner val; use --epochs-from fixed, or more folds"
        )
    return deal_folds(groups, has, min(INNER_FOLDS, least), seed) == 0


def class_columns(labels: NDArray[np.integer], classes: Sequence[str]) -> tuple[NDArray[np.bool_], list[str]]:
    """``has`` and its names: a column per class; of label sets (int [rows, classes], -1 unknown) one for those with a class and
    one for those known to be without it."""
    if labels.ndim == 2:
        return np.concatenate([labels == 1, labels == 0], axis=1), [*classes, *(f"without {name}" for name in classes)]
    return labels[:, None] == np.arange(len(classes)), list(classes)


def _patients(groups: Sequence[str], has: NDArray[np.bool_]) -> tuple[list[str], NDArray[np.bool_], NDArray[np.int64]]:
    """The patients' names, sorted; bool [patients, classes]; and per row its patient's position."""
    names, codes = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    of_patient = np.zeros((len(names), has.shape[1]), bool)
    np.logical_or.at(of_patient, codes, has)
    return names.tolist(), of_patient, codes.astype(np.int64)
