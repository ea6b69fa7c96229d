"""Log-odds, probabilities, and images gathered by patient."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax

from medtl_dist.errors import UserError
from medtl_dist.metrics.scores import by_patient, count_groups, group_codes, log_odds, mixed_groups, probability


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.sampled_from([1.0, 10.0, 300.0]))
def test_log_odds_are_those_of_the_softmax(seed: int, num_classes: int, scale: float) -> None:
    outputs = np.random.default_rng(seed).normal(size=(20, num_classes)) * scale
    log_p = log_softmax(outputs, axis=1)
    others = np.stack(
        [np.logaddexp.reduce(np.delete(log_p, k, axis=1), axis=1) for k in range(num_classes)], axis=1
    )  # log(1 - p), from the other classes
    np.testing.assert_allclose(log_odds(outputs), log_p - others, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(probability(log_odds(outputs)), np.exp(log_p), rtol=1e-9, atol=1e-300)


def test_two_classes_are_exact_mirrors() -> None:
    outputs = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32)
    found = log_odds(outputs)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found[:, 1], outputs[:, 1].astype(float) - outputs[:, 0])
    np.testing.assert_array_equal(found[:, 0], -found[:, 1])


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_outputs_of_one_column_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="K >= 2"):
        log_odds(np.zeros(shape))


def test_probability_neither_overflows_nor_underflows_early() -> None:
    values = np.array([-1e6, -800.0, -40.0, 0.0, 40.0, 800.0, 1e6])
    np.testing.assert_allclose(probability(values), expit(values), rtol=1e-12)


@pytest.mark.parametrize(
    "groups",
    [
        ["b", "a", "c", "a"],
        [3, 1, 3, 7],
        [-2, 5, -2, 0],
        [10**12, 5, 10**12, 0],
        [2.5, 1.0, 2.5, 1.0],
        [],
    ],
)
def test_codes_are_positions_among_the_sorted_names(groups: list) -> None:
    names, codes = group_codes(groups)
    assert names.tolist() == sorted(set(groups))
    assert [names[code] for code in codes] == groups
    assert count_groups(groups) == len(set(groups))


def test_patients_of_two_classes() -> None:
    labels = [0, 1, 0, 0, 1]
    positive = np.array([1.0, 3.0, -1.0, -2.0, 5.0])
    logits, groups = np.stack([-positive, positive], axis=1), ["b", "b", "a", "a", "c"]
    mean, top = by_patient(labels, logits, groups), by_patient(labels, logits, groups, aggregate="max")
    assert mean.groups.tolist() == ["a", "b", "c"]
    assert mean.labels.tolist() == [0, 1, 1]  # b has a positive image
    assert mean.logits.tolist() == [[1.5, -1.5], [-2.0, 2.0], [-5.0, 5.0]]
    assert top.logits.tolist() == [[1.0, -1.0], [-3.0, 3.0], [-5.0, 5.0]]  # the most suspicious image
    assert mixed_groups(labels, groups).tolist() == ["b"]


def test_patients_of_several_classes() -> None:
    labels, groups = [2, 2, 0, 1], ["a", "a", "b", "b"]
    logits = np.array([[1.0, 2.0, 3.0], [3.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    found = by_patient(labels, logits, groups)
    assert found.groups.tolist() == ["a"]  # b has two classes
    assert found.labels.tolist() == [2]
    assert found.logits.tolist() == [[2.0, 1.0, 2.0]]
    assert by_patient(labels, logits, groups, aggregate="max").logits.tolist() == [[3.0, 2.0, 3.0]]


def test_an_unknown_aggregate_lists_the_valid_ones() -> None:
    with pytest.raises(UserError, match=r"unknown aggregate 'median'.*valid: mean, max"):
        by_patient([0], [[0.0, 0.0]], ["a"], aggregate="median")


def test_metrics_need_numpy_and_nothing_heavier() -> None:
    heavy = ("torch", "sklearn", "scipy", "pyarrow", "webdataset", "ray")
    code = f"import sys, medtl_dist.metrics.summary, medtl_dist.metrics.pooling; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
