"""Folds: every sample once, patients whole, classes spread, the same wherever and however often it is computed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.data.folds import check_folds, class_columns, deal_folds, inner_val
from medtl_dist.errors import UserError


class Rows(NamedTuple):
    groups: list[str]
    has: np.ndarray
    num_folds: int
    seed: int


@st.composite
def single_labels(draw: st.DrawFn) -> Rows:
    """Rows of patients of 1 to 6 images; a patient's images may differ in class. Every class has patients enough."""
    num_folds = draw(st.integers(2, 6))
    num_classes = draw(st.integers(2, 4))
    groups, labels = [], []
    num_patients = draw(st.integers(num_folds * num_classes, 60))
    for patient in range(num_patients):
        size = draw(st.integers(1, 6))
        one = patient % num_classes
        groups += [f"p{patient}"] * size
        labels += [one] + [draw(st.sampled_from([one, one, 0])) for _ in range(size - 1)]
    has, _ = class_columns(np.array(labels), [f"c{k}" for k in range(num_classes)])
    return Rows(groups, has, num_folds, draw(st.integers(0, 2**31)))


def rarest_stratum(rows: Rows) -> dict[str, int]:
    """Each patient's rarest class, by brute force."""
    of_patient = {name: {k for g, row in zip(rows.groups, rows.has, strict=True) if g == name for k in np.flatnonzero(row)}
                  for name in set(rows.groups)}  # fmt: skip
    counts = Counter(k for classes in of_patient.values() for k in classes)
    return {name: int(min(classes, key=lambda k: (counts[k], k))) for name, classes in of_patient.items()}


@settings(max_examples=50, deadline=None)
@given(single_labels())
def test_folds_are_whole_patients_and_balanced(rows: Rows) -> None:
    fold = deal_folds(*rows)
    assert fold.shape == (len(rows.groups),)
    assert set(fold.tolist()) == set(range(rows.num_folds))  # each row in one fold, and no fold is empty
    of_patient = {
        group: {f for g, f in zip(rows.groups, fold.tolist(), strict=True) if g == group} for group in rows.groups
    }
    assert all(len(folds) == 1 for folds in of_patient.values())
    sizes = Counter(rows.groups)
    for one in set(rarest_stratum(rows).values()):
        members = [name for name, stratum in rarest_stratum(rows).items() if stratum == one]
        patients, images = np.zeros(rows.num_folds, int), np.zeros(rows.num_folds, int)
        for name in members:
            (number,) = of_patient[name]
            patients[number] += 1
            images[number] += sizes[name]
        assert patients.max() - patients.min() <= 1
        assert images.max() - images.min() <= max(sizes[name] for name in members)


@settings(max_examples=30, deadline=None)
@given(single_labels(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_has_no_say(rows: Rows, random) -> None:
    order = list(range(len(rows.groups)))
    random.shuffle(order)
    other = deal_folds([rows.groups[i] for i in order], rows.has[order], rows.num_folds, rows.seed)
    assert other.tolist() == deal_folds(*rows)[order].tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 40), st.integers(0, 40), st.integers(0, 1000))
def test_patients_of_one_image_make_folds_of_one_size(num_folds: int, more: int, others: int, seed: int) -> None:
    labels = np.array([0] * (num_folds + more) + [1] * (num_folds + others))
    has, _ = class_columns(labels, ["a", "b"])
    sizes = np.bincount(deal_folds([str(i) for i in range(len(labels))], has, num_folds, seed), minlength=num_folds)
    assert sizes.max() - sizes.min() <= 1


def test_repeats_deal_anew_even_where_no_two_patients_are_of_one_size() -> None:
    groups = [f"p{patient}" for patient in range(20) for _ in range(patient + 1)]
    has, _ = class_columns(np.array([int(group[1:]) % 2 for group in groups]), ["a", "b"])
    together = []
    for seed in range(10):
        fold = dict(zip(groups, deal_folds(groups, has, 5, seed).tolist(), strict=True))
        together.append(frozenset(frozenset(name for name in fold if fold[name] == f) for f in range(5)))
    assert len(set(together)) == 10


def test_any_two_patients_may_meet() -> None:
    has, _ = class_columns(np.array([0] * 12 + [1] * 12), ["a", "b"])
    folds = [deal_folds([f"p{i:02d}" for i in range(24)], has, 4, seed) for seed in range(60)]
    meetings = np.sum([fold[:, None] == fold[None, :] for fold in folds], axis=0)
    assert meetings.min() > 0


_SCRIPT = """
import numpy as np
from medtl_dist.data.folds import deal_folds, class_columns
has, _ = class_columns(np.arange(60) % 3, ["a", "b", "c"])
print(deal_folds([f"patient {i // 2}" for i in range(60)], has, 4, 7).tolist())
"""


def test_another_hash_seed_gives_the_same_folds() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", _SCRIPT], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_label_sets_spread_their_rare_class() -> None:
    rng = np.random.default_rng(0)
    sets = (rng.random((120, 4)) < [0.5, 0.3, 0.2, 0]).astype(np.int8)
    sets[rng.random((120, 4)) < 0.1] = -1
    sets[::24, 3] = 1  # five patients
    sets[:, 3][sets[:, 3] != 1] = 0
    groups = [f"p{i}" for i in range(120)]
    has, names = class_columns(sets, ["w", "x", "y", "rare"])
    assert has.shape == (120, 8)
    assert names[7] == "without rare"
    check_folds(groups, has, names, 5)
    fold = deal_folds(groups, has, 5, 0)
    assert sorted(fold[::24].tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"'rare' has 5: give --folds 5 or fewer"):
        check_folds(groups, has, names, 6)


@pytest.mark.parametrize(
    ("labels", "groups", "num_folds", "message"),
    [
        ([0, 1] * 4, "aabbccdd", 5, r"--folds 5: only 4 patients outside test"),
        ([0, 0, 0, 0, 1, 1], "abcdee", 3, r"'sick' has 1: pack the set without class 'sick', or with more"),
        ([0, 0, 0, 1, 1, 0], "abcdef", 3, r"of the 6 patients outside test 'sick' has 2: give --folds 2 or fewer"),
        ([0, 0, 0], "abc", 2, r"all of one class"),
        ([0, 1, 0, 1], "abcd", 1, r"--folds 1: 2 to 100 folds expected"),
    ],
)
def test_refusals_say_what_to_do(labels: list[int], groups: str, num_folds: int, message: str) -> None:
    has, names = class_columns(np.array(labels), ["well", "sick"])
    with pytest.raises(UserError, match=message):
        check_folds(list(groups), has, names, num_folds)


@settings(max_examples=30, deadline=None)
@given(single_labels())
def test_the_inner_val_is_of_other_patients_and_has_every_class(rows: Rows) -> None:
    inner = inner_val(rows.groups, rows.has, rows.seed)
    own = {group for group, yes in zip(rows.groups, inner, strict=True) if yes}
    assert own
    assert own.isdisjoint(group for group, yes in zip(rows.groups, inner, strict=True) if not yes)
    strata = rarest_stratum(rows)
    assert {strata[name] for name in own} == set(strata.values()) or min(Counter(strata.values()).values()) < 5
    classes = Counter(
        k
        for k in range(rows.has.shape[1])
        for _ in {g for g, yes in zip(rows.groups, rows.has[:, k], strict=True) if yes}
    )
    rarest = min(classes, key=lambda k: (classes[k], k))
    sides = [{g for g, one, held in zip(rows.groups, rows.has[:, rarest], inner, strict=True) if one and held is side}
             for side in (np.True_, np.False_)]  # fmt: skip
    assert all(sides)


def test_one_patient_of_a_class_can_not_be_split_for_the_epochs() -> None:
    has, _ = class_columns(np.array([0, 0, 0, 1]), ["a", "b"])
    with pytest.raises(UserError, match="single patient"):
        inner_val(list("wxyz"), has, 0)
