"""Splits: groups stay whole, shares come near the wish, what is given is kept, the order of rows has no say."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.data import split
from medtl_dist.errors import UserError

FRACTIONS = (0.7, 0.15, 0.15)

# Groups of 1 to 6 images, each image of class 0, 1 or 2.
patients = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=60)
seeds = st.integers(0, 2**32)


def rows_of(images: list[list[int]]) -> tuple[list[str], np.ndarray]:
    groups = [f"p{patient}" for patient, labels in enumerate(images) for _ in labels]
    return groups, np.array([label for labels in images for label in labels], dtype=np.int64)


@settings(deadline=None, max_examples=150)
@given(patients, seeds, st.randoms())
def test_groups_stay_whole_and_the_order_of_rows_has_no_say(images: list[list[int]], seed: int, random) -> None:
    groups, labels = rows_of(images)
    none = [None] * len(groups)
    drawn = split.complete(none, groups, labels, FRACTIONS, seed)
    assert drawn.method == "by group"
    assert drawn.drawn
    assert set(drawn.splits) <= {"train", "val", "test"}
    assert not split.straddling(drawn.splits, groups)

    order = list(range(len(groups)))
    random.shuffle(order)
    again = split.complete(none, [groups[row] for row in order], labels[order], FRACTIONS, seed)
    assert again.splits == [drawn.splits[row] for row in order]


@settings(deadline=None, max_examples=100)
@given(patients, seeds)
def test_every_class_comes_near_its_share_in_every_split(images: list[list[int]], seed: int) -> None:
    groups, labels = rows_of(images)
    splits = np.array(split.complete([None] * len(groups), groups, labels, FRACTIONS, seed).splits)
    largest = max(len(patient) for patient in images)
    for label in np.unique(labels):
        for name, fraction in zip(("train", "val", "test"), FRACTIONS, strict=True):
            wish = fraction * (labels == label).sum()
            assert abs(((splits == name) & (labels == label)).sum() - wish) <= 2 * largest


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=300), seeds)
def test_single_images_are_divided_to_within_one(classes: list[int], seed: int) -> None:
    labels = np.array(classes, dtype=np.int64)
    groups = [f"i{row}" for row in range(len(labels))]
    splits = np.array(split.complete([None] * len(groups), groups, labels, FRACTIONS, seed).splits)
    for label in np.unique(labels):
        for name, fraction in zip(("train", "val", "test"), FRACTIONS, strict=True):
            assert abs(((splits == name) & (labels == label)).sum() - fraction * (labels == label).sum()) <= 1


def test_large_groups_reach_every_split() -> None:
    sizes = [20] * 20 + [1] * 400
    groups, labels = rows_of([[i % 2] * size for i, size in enumerate(sizes)])
    drawn = split.by_group(groups, labels, {"train": 0.7, "val": 0.15, "test": 0.15}, seed=3)
    large = [drawn[f"p{patient}"] for patient in range(20)]
    assert {name: large.count(name) for name in ("train", "val", "test")} == {"train": 14, "val": 3, "test": 3}


def test_seeds_differ_and_repeat() -> None:
    groups, labels = rows_of([[i % 2] for i in range(100)])
    draw = [split.by_group(groups, labels, {"train": 0.5, "test": 0.5}, seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def test_a_share_of_nothing_gets_nothing() -> None:
    groups, labels = rows_of([[i % 2] for i in range(9)])
    assert set(split.complete([None] * 9, groups, labels, (0, 0, 1), 0).splits) == {"test"}


@settings(deadline=None, max_examples=150)
@given(patients, seeds, st.data())
def test_given_splits_are_kept_and_completed(images: list[list[int]], seed: int, data: st.DataObject) -> None:
    """Each patient has a given split or none, and some of its images do not say it."""
    groups, labels = rows_of(images)
    of_patient = {group: data.draw(st.sampled_from(["train", "val", "test", None])) for group in dict.fromkeys(groups)}
    given_splits = [of_patient[group] if data.draw(st.booleans()) else None for group in groups]
    result = split.complete(given_splits, groups, labels, FRACTIONS, seed).splits

    assert not split.straddling(result, groups)
    if not any(given_splits):
        return
    for before, after in zip(given_splits, result, strict=True):
        if before in ("val", "test"):
            assert after == before
        elif before == "train":
            assert after == "train" or (after == "val" and "val" not in given_splits)
    if "test" not in given_splits:
        assert "test" not in result  # never carved out of what was given


def test_a_missing_val_is_taken_from_train_by_group_and_class() -> None:
    groups, labels = rows_of([[i % 2] * 2 for i in range(200)])
    given_splits = ["test" if i < 60 else "train" for i in range(400)]
    done = split.complete(given_splits, groups, labels, FRACTIONS, 0)
    assert done.method == "given, val from train by group"
    assert done.splits[:60] == ["test"] * 60
    wish = 340 * 0.15 / 0.85
    for label in (0, 1):
        val = sum(name == "val" and y == label for name, y in zip(done.splits, labels, strict=True))
        assert abs(val - wish / 2) <= 2


def test_complete_splits_are_only_kept() -> None:
    names = ["train", "val", "test", "train"]
    done = split.complete(names, list("abcd"), np.array([0, 1, 0, 1]), FRACTIONS, 0)
    assert (done.splits, done.method, done.drawn) == (names, "given", False)


def test_straddling_groups_are_named_with_their_splits() -> None:
    found = split.straddling(["train", "test", None, "train", "val"], ["b", "b", "b", "a", "a"])
    assert found == {"a": {"train", "val"}, "b": {"train", "test"}}
    assert list(found) == ["a", "b"]


@pytest.mark.parametrize("text", ["", "0.7", "0.7,0.3", "a,b,c", "0.7,0.2,0.2", "1.2,-0.1,-0.1", "nan,0.5,0.5"])
def test_shares_that_do_not_add_up_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="three shares of train, val, test that add up to 1"):
        split.parse_fractions(text)


def test_shares_are_read() -> None:
    assert split.parse_fractions("0.8, 0.1,0.1") == (0.8, 0.1, 0.1)


@settings(deadline=None, max_examples=50)
@given(st.sets(st.binary(min_size=16, max_size=16), max_size=30), seeds)
def test_the_packing_order_depends_on_keys_and_seed_alone(keys: set[bytes], seed: int) -> None:
    forward, backward = sorted(keys), sorted(keys, reverse=True)
    assert [forward[i] for i in split.shuffled(forward, seed)] == [backward[i] for i in split.shuffled(backward, seed)]


def test_splitting_needs_neither_torch_nor_webdataset() -> None:
    code = "import sys, medtl_dist.data.split; print({'torch', 'webdataset', 'cv2'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
