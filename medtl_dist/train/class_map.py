"""another set's classes → the run's: by equal names, or as the user says; nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.label_sets import TASK, UNKNOWN
from medtl_dist.data.shards import Dataset
from medtl_dist.errors import UserError


@dataclass(frozen=True)
class ClassMap:
    """``told``: their class to ours; ``places``: of each of theirs, the place of ours; ``num_ours``; ``without_images``: ours
    that no class of theirs stands for; ``several``: labels are sets."""

    told: dict[str, str]
    places: tuple[int, ...]
    num_ours: int
    without_images: tuple[str, ...]
    several: bool

    def labels(self, values: Sequence[Any]) -> NDArray[np.int64]:
        """Their labels as ours: int64 [n], or label sets [n, num_ours] with -1 for unknown. Of several of theirs that
        stand for one of ours it is present if any is, absent if all are."""
        if not self.several:
            return np.asarray(self.places, np.int64)[np.asarray(values, np.int64)]
        theirs = np.array([[UNKNOWN if one is None else one for one in row] for row in values], np.int64)
        found = np.full((len(theirs), self.num_ours), UNKNOWN, np.int64)
        for ours in set(self.places):
            columns = theirs[:, [k for k, place in enumerate(self.places) if place == ours]]
            found[:, ours] = np.where((columns == 1).any(axis=1), 1, np.where((columns == 0).all(axis=1), 0, UNKNOWN))
        return found


def parse_class_map(text: str) -> dict[str, str]:
    """``theirs=ours,…``. Raises UserError: anything else, or one of theirs twice."""
    found: dict[str, str] = {}
    for part in text.split(","):
        theirs, equals, ours = (piece.strip() for piece in part.partition("="))
        if not equals or not theirs or not ours or theirs in found:
            raise UserError(
                f"--class-map {text}: expected theirs=ours,…, each of theirs once, as viral=PNEUMONIA,healthy=NORMAL"
            )
        found[theirs] = ours
    return found


def map_classes(dataset: Dataset, ours: Sequence[str], task: str, given: Mapping[str, str]) -> ClassMap:
    """Which of ours each class of the set is. Raises UserError: another kind of task, a class without a counterpart."""
    theirs = dataset.classes
    if (dataset.task == TASK) != (task == TASK):
        raise UserError(
            f"{dataset.folder} is {dataset.task} and the run {task}: several labels an image can't become one"
        )
    lists = f"theirs: {', '.join(theirs)}; ours: {', '.join(ours)}"
    unknown = [name for name in given if name not in theirs] + [name for name in given.values() if name not in ours]
    if unknown:
        raise UserError(f"--class-map names {', '.join(unknown)}, which is no such class ({lists})")
    told = {name: given.get(name, name) for name in theirs}
    homeless = [name for name, other in told.items() if other not in ours]
    if homeless:
        raise UserError(
            f"{dataset.folder} has classes that the run does not know: {', '.join(homeless)} ({lists}); say what they are with "
            f"--class-map {homeless[0]}=CLASS,…"
        )
    missing = tuple(name for name in ours if name not in told.values())
    if missing and task == "binary":
        raise UserError(
            f"no class of {dataset.folder} stands for {', '.join(missing)} ({lists}): with one class there is nothing to tell "
            "apart; say which is which with --class-map"
        )
    places = tuple(list(ours).index(told[name]) for name in theirs)
    return ClassMap(told, places, len(ours), missing, task == TASK)
