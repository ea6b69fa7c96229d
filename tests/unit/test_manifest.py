"""Manifests: everyone is somewhere exactly once, leaks and contradictions are refused, order has no say."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.data import identity
from medtl_dist.data.manifest import Manifest, build_manifest, cautions, exclusion_counts, identify
from medtl_dist.data.sources import Listing, class_order
from medtl_dist.errors import LeakageError, UserError

SECRET = b"s" * 32


def listing_of(
    labels: list[str],
    *,
    names: list[str] | None = None,
    splits: list[str | None] | None = None,
    units: dict[str, list[tuple[str, ...] | None]] | None = None,
    kept: pa.Table | None = None,
) -> Listing:
    names = names or [f"images/{row}.png" for row in range(len(labels))]
    return Listing(
        kind="table",
        names=names,
        files=names,
        rows=[-1] * len(labels),
        labels=labels,
        splits=splits or [None] * len(labels),
        domains=[None] * len(labels),
        units=units or {},
        kept=kept,
        classes=class_order({label for label in labels if label}),
    )


def manifest_of(listing: Listing, **options) -> Manifest:
    return build_manifest(listing, identify(listing, SECRET), **options)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", ""]), st.integers(0, 6), st.sampled_from(["train", None])), min_size=4
    ),
    st.integers(0, 9),
    st.randoms(),
)
def test_every_entry_is_packed_once_or_excluded_and_order_has_no_say(rows: list, seed: int, random) -> None:
    rows = [*rows, ("a", 7, None), ("b", 8, None)]
    names = [f"images/{row}.png" for row in range(len(rows))]

    def build(order: list[int]) -> Manifest:
        listing = listing_of(
            [rows[i][0] for i in order],
            names=[names[i] for i in order],
            splits=[rows[i][2] for i in order],
            units={"patient": [(str(rows[i][1]),) for i in order]},
        )
        return manifest_of(listing, seed=seed, missing=[row for row, i in enumerate(order) if i == 0])

    built = build(list(range(len(rows))))
    packed = [row for order in built.order.values() for row in order]
    assert sorted([*packed, *built.excluded]) == list(range(len(rows)))
    assert sum(entry["samples"] for entry in exclusion_counts(built, built.excluded)) == len(built.excluded)

    order = list(range(len(rows)))
    random.shuffle(order)
    again = build(order)
    for split in set(built.order) | set(again.order):
        keys = [built.identities.keys[row] for row in built.order[split]]
        assert keys == [again.identities.keys[row] for row in again.order[split]]
        groups = {built.identities.groups[row] for row in built.order[split]}
        others = {built.identities.groups[row] for other in built.order if other != split for row in built.order[other]}
        assert not groups & others


def test_groups_are_hashed_by_column_composite_and_component() -> None:
    one = identify(listing_of(["a", "b"], units={"patient": [("7",), ("8",)]}), SECRET)
    assert one.source == "column patient"
    assert one.groups == [identity.group_key(SECRET, "7"), identity.group_key(SECRET, "8")]

    both = identify(listing_of(["a", "b"], units={"split+patient": [("test", "7"), ("train", "7")]}), SECRET)
    assert both.source == "column split+patient"
    assert both.groups[0] == identity.group_key(SECRET, "test", "7") != both.groups[1]

    joined = identify(
        listing_of(["a"] * 4, units={"p": [("1",), ("2",), ("3",), None], "s": [None, ("x",), ("y",), ("x",)]}), SECRET
    )
    assert joined.source == "columns p, s joined"
    assert joined.groups[1] == joined.groups[3]
    assert len(set(joined.groups)) == 3

    none = identify(listing_of(["a", "b"]), SECRET)
    assert none.source == "none"
    assert none.groups == [key.hex() for key in none.keys]


def test_the_key_secret_does_not_move_a_patient_to_another_split() -> None:
    listing = listing_of(["a", "b"] * 20, units={"patient": [(str(row // 2),) for row in range(40)]})
    splits = [build_manifest(listing, identify(listing, secret)).splits for secret in (b"1" * 32, b"2" * 32)]
    assert splits[0] == splits[1]


def test_a_group_in_two_given_splits_is_leakage_named_by_key() -> None:
    listing = listing_of(
        ["a", "b", "a", "b"],
        splits=["train", "test", "train", "test"],
        units={"patient": [("John Doe",), ("John Doe",), ("X",), ("Y",)]},
    )
    with pytest.raises(LeakageError) as caught:
        manifest_of(listing, split_column="fold")
    text = str(caught.value)
    assert text.startswith("1 of 3 groups (column patient) are in more than one given split (1 in train and test): ")
    assert identity.group_key(SECRET, "John Doe") in text
    assert "--group-col fold+patient" in text
    assert "John" not in text


def test_an_image_in_two_given_splits_is_leakage() -> None:
    listing = listing_of(["a", "a", "b"], names=["1.png", "1.png", "2.png"], splits=["train", "test", "train"])
    with pytest.raises(
        LeakageError, match=r"1 images are listed in more than one split \(for example key [0-9a-f]{32}\)"
    ):
        manifest_of(listing)


def test_a_row_said_twice_counts_once_and_contradictions_are_refused() -> None:
    names = ["1.png", "1.png", "2.png"]
    built = manifest_of(listing_of(["a", "a", "b"], names=names))
    assert built.excluded == {1: "listed more than once"}
    for other in (
        listing_of(["a", "b", "b"], names=names),
        listing_of(["a", "a", "b"], names=names, units={"p": [("1",), ("2",), ("3",)]}),
        listing_of(["a", "a", "b"], names=names, kept=pa.table({"age": [1, 2, 3]})),
    ):
        with pytest.raises(
            UserError, match="1 rows name an image again with another label, group, domain or kept value"
        ):
            manifest_of(other)


def test_exclusions_are_counted_by_reason_split_and_class() -> None:
    listing = listing_of(
        ["a", "b", "", "a", "a", "b"],
        splits=["train", "train", "test", None, "test", "test"],
        units={"p": [(str(row // 2),) for row in (0, 1, 4, 6, 8, 9)]},
    )
    built = manifest_of(listing, missing=[3])
    assert built.excluded == {2: "empty label", 3: "missing file"}
    assert exclusion_counts(built, built.excluded | {4: "unreadable image"}) == [
        {"reason": "empty label", "split": "test", "class": None, "samples": 1, "groups": 1},
        {"reason": "missing file", "split": None, "class": "a", "samples": 1, "groups": 1},
        {"reason": "unreadable image", "split": "test", "class": "a", "samples": 1, "groups": 1},
    ]


@pytest.mark.parametrize(
    ("labels", "positive", "classes", "named"),
    [
        (["sick", "well"], None, ("sick", "well"), "well"),
        (["sick", "well"], "sick", ("well", "sick"), "sick"),
        (["10", "9"], None, ("9", "10"), "10"),
        (["b", "c", "a"], None, ("a", "b", "c"), None),
    ],
)
def test_label_one_of_two_classes_is_the_positive_one(
    labels: list[str], positive: str | None, classes: tuple[str, ...], named: str | None
) -> None:
    built = manifest_of(listing_of(labels), positive=positive)
    assert built.classes == classes
    assert built.positive_class == named
    assert [built.classes[label] for label in built.labels] == labels
    assert built.task == ("binary" if len(classes) == 2 else "multiclass")
    assert bool(built.notes) == (positive is None and named is not None)


@pytest.mark.parametrize(
    ("labels", "positive", "message"),
    [
        (["a", "a"], None, "2 images, all of class 'a': at least two classes"),
        (["", ""], None, "0 images, none with a label"),
        (["a", "b"], "c", "--positive c: the classes are a, b"),
        (["a", "b", "c"], "a", "only two classes have a positive one; these are 3"),
        ([f"patient {i}" for i in range(40)], None, "40 different labels among 40 images: these are no classes"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(labels: list[str], positive: str | None, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        manifest_of(listing_of(labels), positive=positive)


def test_cautions_name_missing_splits_empty_classes_and_placeholder_groups() -> None:
    patients: list[tuple[str, ...] | None] = [*[("unknown",)] * 15, *((str(i),) for i in range(25))]
    built = manifest_of(listing_of(["a"] * 20 + ["b"] * 20, splits=[*["train"] * 40], units={"p": patients}))
    counts = {"train": {"classes": {"a": 20, "b": 20}}, "val": {"classes": {"a": 0, "b": 3}}}
    assert cautions(built, counts) == [
        "split val has no image of class 'a'",
        "there is no test split",
        "one group has 15 of 40 images: is its id a placeholder such as 'unknown'?",
    ]
    assert cautions(manifest_of(listing_of(["a", "b"])), counts)[0].startswith("patients are unknown")
