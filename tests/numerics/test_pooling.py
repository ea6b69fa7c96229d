"""Scores dealt to ranks, some sent twice → exactly the one-process result, or an error; never a silent gap."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.errors import DataError, TrainingError
from medtl_dist.metrics.pooling import pool
from medtl_dist.metrics.scores import log_odds
from medtl_dist.metrics.summary import summarise

Part = dict[str, np.ndarray]


def scored(num_images: int, seed: int = 0) -> tuple[list[str], Part]:
    """Expected keys, and one process's rows: keys, labels, float32 outputs of two classes with ties."""
    rng = np.random.default_rng(seed)
    keys = [f"{value:032x}" for value in rng.permutation(num_images)]
    outputs = np.round(rng.normal(size=(num_images, 2)), 1).astype(np.float32)
    return keys, {"keys": np.array(keys), "labels": rng.integers(0, 2, num_images), "logits": outputs}


def take(part: Part, rows: np.ndarray) -> Part:
    return {name: values[rows] for name, values in part.items()}


@st.composite
def dealings(draw: st.DrawFn) -> tuple[list[str], Part, list[Part]]:
    """One process's rows, and the same rows dealt to 1 … 4 ranks of unequal size in any order, some sent twice."""
    num_images = draw(st.integers(1, 40))
    keys, whole = scored(num_images, draw(st.integers(0, 10_000)))
    num_ranks = draw(st.integers(1, 4))
    rank_of = draw(st.lists(st.integers(0, num_ranks - 1), min_size=num_images, max_size=num_images))
    twice = draw(st.lists(st.integers(0, num_images - 1), max_size=10))
    dealt = [[i for i in range(num_images) if rank_of[i] == rank] for rank in range(num_ranks)]
    for image in twice:
        dealt[draw(st.integers(0, num_ranks - 1))].append(image)
    parts = [take(whole, np.array(draw(st.permutations(rows)), dtype=int)) for rows in dealt]
    return keys, whole, parts


@settings(deadline=None, max_examples=60)
@given(dealings())
def test_any_dealing_to_ranks_gives_the_one_process_result(dealing: tuple[list[str], Part, list[Part]]) -> None:
    keys, whole, parts = dealing
    pooled = pool(parts, keys)
    assert pooled["keys"].tolist() == keys
    np.testing.assert_array_equal(pooled["labels"], whole["labels"])
    np.testing.assert_array_equal(pooled["logits"], whole["logits"])
    assert pooled["logits"].dtype == np.float32


@settings(deadline=None, max_examples=15)
@given(dealings())
def test_the_whole_summary_is_equal_to_the_last_bit(dealing: tuple[list[str], Part, list[Part]]) -> None:
    keys, whole, parts = dealing
    groups = np.array([key[-1] for key in keys])

    def entry(rows: Part) -> str:
        found = summarise(
            classes=["NORMAL", "PNEUMONIA"],
            task="binary",
            labels=rows["labels"],
            logits=log_odds(rows["logits"]),
            groups=groups,
            loss=0.1,
            threshold={"value": 0.5, "logit": 0.0, "rule": "youden", "fixed_on": "val", "caution": None},
            num_bootstrap=20,
        )
        return json.dumps(found, allow_nan=False)

    pooled = pool(parts, keys)
    assert entry({"labels": pooled["labels"], "logits": pooled["logits"]}) == entry(whole)


@settings(deadline=None, max_examples=30)
@given(dealings(), st.data())
def test_a_missing_image_is_an_error_that_names_it(dealing: tuple, data: st.DataObject) -> None:
    keys, _, parts = dealing
    lost = data.draw(st.sampled_from(keys))
    with pytest.raises(DataError, match=f"1 of {len(keys)} images of split val were not scored.*{lost}"):
        pool([take(part, part["keys"] != lost) for part in parts], keys, "val")


def test_an_unknown_image_is_an_error() -> None:
    keys, whole = scored(5)
    with pytest.raises(DataError, match=f"scored but are not in the index.*{keys[2]}"):
        pool([whole], keys[:2] + keys[3:])


@pytest.mark.parametrize("field", ["labels", "logits"])
def test_one_image_with_two_results_is_an_error(field: str) -> None:
    keys, whole = scored(5)
    other = take(whole, np.array([3]))
    other[field] = other[field] + 1
    with pytest.raises(DataError, match=f"scored twice with different results.*{keys[3]}"):
        pool([whole, other], keys)


def test_the_last_bit_of_a_duplicate_counts() -> None:
    keys, whole = scored(5)
    other = take(whole, np.array([3]))
    other["logits"] = np.nextafter(other["logits"], np.float32(9))
    with pytest.raises(DataError, match="different results"):
        pool([whole, other], keys)


def test_an_index_that_lists_an_image_twice_is_an_error() -> None:
    keys, whole = scored(3)
    with pytest.raises(DataError, match=f"listed twice in the index.*{keys[1]}"):
        pool([whole], [*keys, keys[1]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_no_number_means_diverged_training(value: float) -> None:
    keys, whole = scored(4)
    whole["logits"][2, 1] = value
    with pytest.raises(TrainingError, match=f"for 1 of 4 images.*{keys[2]}.*diverged"):
        pool([whole], keys)


def test_ranks_without_images_and_empty_splits() -> None:
    keys, whole = scored(3)
    empty: Part = {"keys": np.array([]), "labels": np.array([]), "logits": np.zeros((0, 2))}
    assert pool([empty, whole, {"keys": [], "labels": [], "logits": []}], keys)["keys"].tolist() == keys
    assert len(pool([empty], [])["keys"]) == 0
    with pytest.raises(DataError, match="3 of 3 images were not scored"):
        pool([empty], keys)


def test_arrays_of_unequal_length_are_refused() -> None:
    keys, whole = scored(3)
    with pytest.raises(ValueError, match="3 keys, 2 labels"):
        pool([whole | {"labels": whole["labels"][:2]}], keys)
