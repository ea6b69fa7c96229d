"""The threshold when the pairs that it is taken from are copies themselves: simulated scores, and whole sets."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from audit_sets import Entry, base, pack_entries

from medtl_dist.data.audit_match import fit_threshold
from medtl_dist.data.audit_null import RUNGS, Ladder, fit_strangers
from medtl_dist.data.audit_search import Pairs


def scores_of(rng: np.random.Generator, strangers: int, copies: int, mean: float, scale: float) -> np.ndarray:
    """Strangers' z are normal; copies' z spread around 2.3 (a score of 0.98)."""
    z = np.concatenate([rng.normal(mean, scale, strangers), np.clip(rng.normal(2.3, 0.5, copies), 1.2, 3.8)])
    return np.tanh(z)


@pytest.mark.parametrize("copies", [0, 30, 150, 255])
@pytest.mark.parametrize(("mean", "scale"), [(0.45, 0.12), (0.9, 0.15)])
def test_strangers_are_told_from_copies(mean: float, scale: float, copies: int) -> None:
    rng = np.random.default_rng(copies)
    fits = [fit_strangers(scores_of(rng, 300 - copies, copies, mean, scale)) for _ in range(5)]
    assert np.median([fit.mean for fit in fits]) == pytest.approx(mean, abs=0.03)
    assert np.median([fit.scale for fit in fits]) == pytest.approx(scale, rel=0.15)
    for fit in fits:
        assert abs(int(fit.suspected.sum()) - copies) <= 8
        assert fit.suspected[: 300 - copies].sum() <= 5  # the two laws overlap a little


@pytest.mark.parametrize("copies", [0, 30, 150])
def test_expected_false_is_what_strangers_really_do(copies: int) -> None:
    """Of 20 sets the candidates let through (closed form of the known law) are within a factor of five of what is told,
    in the middle within two."""
    rng = np.random.default_rng(7)
    mean, scale, compared = 0.6, 0.15, 3000
    ratios = []
    for _ in range(20):
        found = fit_threshold(scores_of(rng, 300 - copies, copies, mean, scale), compared)
        truth = compared * 0.5 * math.erfc((math.atanh(found.candidate) - mean) / scale / math.sqrt(2))
        ratios.append(truth / found.expected_false["candidates"])
    assert 0.5 < np.median(ratios) < 2
    assert np.quantile(ratios, 0.1) > 0.2
    assert np.quantile(ratios, 0.9) < 5


def test_too_few_strangers_make_no_threshold() -> None:
    rng = np.random.default_rng(1)
    found = fit_threshold(scores_of(rng, 30, 100, 0.45, 0.12), compared=100)
    assert (found.confirmed, found.suspected) == (None, 100)
    assert 28 <= found.null_pairs <= 30


def pairs_of(first: list[int], second: list[int], score: list[float]) -> Pairs:
    none = np.zeros(len(first), np.int64)
    return Pairs(
        np.array(first), np.array(second), none, np.array(score), np.zeros((len(first), 4)), np.ones(len(first), bool)
    )


def test_a_ladder_goes_down_from_suspected_pairs_only() -> None:
    found = pairs_of([0, 0, 0, 2, 4], [1, 2, 3, 3, 5], [0.9, 0.8, 0.7, 0.6, 0.99])
    ladder = Ladder(found, np.array([0, 1, 2, 3, 4, 4], np.int32))
    assert ladder.places.tolist() == [0, 1, 2]  # 4 and 5 are one group; 1 meets 0 only
    assert ladder.climb_down(np.array([0]))
    assert ladder.places.tolist() == [0, 1, 2]  # 0 goes on to 2; 1 has nobody else
    assert ladder.climb_down(np.array([1]))
    assert ladder.places.tolist() == [0, 2, 3]  # 0 goes on to 3, and so does 2
    assert not ladder.climb_down(np.array([0]))
    assert len(Ladder(pairs_of([0] * 9, list(range(1, 10)), [0.5] * 9), np.arange(10, dtype=np.int32)).places) == 9
    assert RUNGS < 9


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9])
def test_a_set_full_of_copies_has_a_sensible_threshold(tmp_path: Path, share: float) -> None:
    entries = base(60)
    changed = []
    for number, entry in enumerate(entries[: round(60 * share)]):
        image = entry.image[2:93, 3:95] if number % 2 else 255 - entry.image
        data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 75])[1]
        changed.append(Entry(np.asarray(cv2.imdecode(data, 0)), f"copy-{number}", entry.split, entry.label))
    found = pack_entries(tmp_path, [*entries, *changed]).info["audit"]
    threshold = found["threshold"]
    assert threshold["confirmed"] < 0.9
    assert threshold["null_pairs"] >= 40
    assert threshold["null_largest"] < 0.75
    assert abs(threshold["suspected"] - len(changed)) <= 2
    assert threshold["expected_false"]["confirmed"] <= 0.01
    assert len(changed) - 1 <= found["near_pairs"] <= len(changed)
