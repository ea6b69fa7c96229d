"""AUC of pairs within folds, against counting every pair, and its variance against a jackknife and against new samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from medtl_dist.data.folds import class_columns, deal_folds
from medtl_dist.metrics.intervals import auc_interval, clustered_variance, components
from medtl_dist.metrics.within import mean_roc, over_repeats, within_folds, within_interval


def brute_force(labels, scores, codes, folds, num_patients):
    """AUC and each patient's shares (positive, negative), pair by pair."""
    won = pairs = 0.0
    for i in range(len(labels)):
        for j in range(len(labels)):
            if labels[i] == 1 and labels[j] == 0 and folds[i] == folds[j]:
                pairs += 1
                won += (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
    if pairs == 0:
        return None, None
    auc = won / pairs
    shares = np.zeros((2, num_patients))
    for i in range(len(labels)):
        for j in range(len(labels)):
            if labels[i] == 1 and labels[j] == 0 and folds[i] == folds[j]:
                right = (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) - auc
                shares[0, codes[i]] += right / pairs
                shares[1, codes[j]] += right / pairs
    return auc, shares


@st.composite
def samples(draw: st.DrawFn):
    """Rows of patients in folds, scores with ties, some folds of one class."""
    num_patients = draw(st.integers(2, 10))
    fold_of = [draw(st.integers(0, 3)) for _ in range(num_patients)]
    codes = np.array([p for p in range(num_patients) for _ in range(draw(st.integers(1, 3)))])
    labels = np.array([draw(st.integers(0, 1)) for _ in codes])
    scores = np.array([draw(st.integers(0, 4)) for _ in codes], float)
    return labels, scores, codes, np.array([fold_of[p] for p in codes]), num_patients


@settings(max_examples=50, deadline=None)
@given(samples())
def test_it_is_the_count_of_pairs(sample) -> None:
    auc, shares = brute_force(*sample)
    found = within_folds(*sample)
    if auc is None or shares is None:
        assert found.parts is None
        assert within_interval([[found]]).reason == "undefined: no fold has patients of both classes"
        return
    assert found.parts is not None
    assert found.auc == pytest.approx(auc, abs=1e-12)
    np.testing.assert_allclose([found.parts.positive, found.parts.negative], shares, atol=1e-12)
    labels, _, codes, folds, _ = sample
    usable = [f for f in set(folds.tolist()) if len(set(labels[folds == f].tolist())) == 2]
    assert [one.fold for one in found.folds if one.auc is not None] == sorted(usable)
    in_pairs = np.isin(folds, usable)
    assert set(np.flatnonzero(found.parts.has_positive)) == set(codes[in_pairs & (labels == 1)])
    assert set(np.flatnonzero(found.parts.has_negative)) == set(codes[in_pairs & (labels == 0)])


def test_one_fold_is_the_ordinary_clustered_interval() -> None:
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(30), 3)
    labels = (codes % 2).astype(int)
    scores = rng.normal(size=90) + labels + rng.normal(size=30)[codes]
    found = within_interval([[within_folds(labels, scores, codes, np.zeros(90, int), 30)]])
    expected = auc_interval(labels, scores, codes)
    assert found.auc == pytest.approx(expected.auc)
    assert found.interval == pytest.approx(expected.interval)
    twice = within_interval([[within_folds(labels, scores, codes, np.zeros(90, int), 30)] * 2])
    assert twice.interval == pytest.approx(expected.interval)  # the same repeat twice tells nothing new


def simulate(rng: np.random.Generator, num_patients: int, num_folds: int, effect: float):
    """Images of patients, half of them positive; each fold's scores at a level of their own."""
    codes = np.repeat(np.arange(num_patients), 2)
    labels = codes % 2
    fold = (np.arange(num_patients) // 2 % num_folds)[codes]
    scores = effect * labels + rng.normal(size=num_patients)[codes] + 0.5 * rng.normal(size=len(codes))
    return labels, scores + 3.0 * rng.normal(size=num_folds)[fold], codes, fold, num_patients


def test_the_variance_is_that_over_new_samples_and_near_the_jackknife() -> None:
    rng = np.random.default_rng(1)
    aucs, variances = [], []
    for _ in range(400):
        found = within_folds(*simulate(rng, 120, 5, 1.0))
        assert found.parts is not None
        aucs.append(found.parts.auc)
        variances.append(clustered_variance(found.parts))
    # 12 + 12 patients a fold: measured ratio 1.03; the standard error of an empirical variance of 400 is 7 %.
    assert np.mean(variances) / np.var(aucs, ddof=1) == pytest.approx(1.04, abs=0.16)
    sample = simulate(rng, 120, 5, 1.0)
    labels, scores, codes, folds, size = sample
    left = [
        within_folds(labels[codes != p], scores[codes != p], codes[codes != p], folds[codes != p], size).auc
        for p in range(size)
    ]
    values = np.array(left, float)
    jackknife = (size - 1) / size * np.sum((values - values.mean()) ** 2)
    whole = within_folds(*sample)
    assert whole.parts is not None
    assert clustered_variance(whole.parts) == pytest.approx(jackknife, rel=0.05)
    pooled = components(labels, scores, codes)
    assert pooled is not None
    assert whole.parts.auc > pooled.auc + 0.05  # the folds' own levels blur the pooled scores, and only those


def test_over_repeats_a_patient_is_one_patient() -> None:
    """Repeats of one sample with other noise: the variance of the mean is that of the patients, not a fraction of it."""
    rng = np.random.default_rng(2)
    means, variances = [], []
    for _ in range(300):
        labels, scores, codes, _, size = simulate(rng, 80, 1, 1.0)
        repeats = []
        for repeat in range(4):
            has, _ = class_columns(labels, ["a", "b"])
            fold = deal_folds([f"p{c}" for c in codes], has, 4, repeat)
            repeats.append(within_folds(labels, scores + 0.3 * rng.normal(size=len(scores)), codes, fold, size))
        parts = over_repeats(repeats)
        assert parts is not None
        means.append(parts.auc)
        variances.append(clustered_variance(parts))
    assert np.mean(variances) / np.var(means, ddof=1) == pytest.approx(1.05, abs=0.2)


@pytest.mark.parametrize("stratified", [True, False])
def test_under_pure_noise_pairs_within_folds_average_one_half_and_pooled_scores_less(stratified: bool) -> None:
    """20 images of 8 patients, features without signal, a ridge regression a fold, 200 repetitions (50 would tell the pooled
    scores' .39 in folds drawn by patient alone, but not a small error of ours)."""
    rng = np.random.default_rng(0)
    codes = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6, 6, 7, 7])
    labels = codes % 2
    has, _ = class_columns(labels, ["well", "sick"])
    within, pooled = [], []
    for repetition in range(200):
        features = rng.normal(size=(20, 8))
        fold = (rng.permutation(8) % 2)[codes]
        if stratified:
            fold = deal_folds([f"p{c}" for c in codes], has, 4, repetition)
        scores = np.zeros(20)
        for f in np.unique(fold):
            train, held = features[fold != f], features[fold == f]
            centred, said = train - train.mean(axis=0), labels[fold != f].mean()
            slope = np.linalg.solve(centred.T @ centred + 5 * np.eye(8), centred.T @ (labels[fold != f] - said))
            scores[fold == f] = (held - train.mean(axis=0)) @ slope + said
        within.append(within_folds(labels, scores, codes, fold, 8).auc)
        pooled.append(roc_auc_score(labels, scores))
    defined = np.array([auc for auc in within if auc is not None])
    error = defined.std(ddof=1) / np.sqrt(len(defined))
    print(f"within {defined.mean():.3f} ± {error:.3f}, pooled {np.mean(pooled):.3f} ± {np.std(pooled) / 200**0.5:.3f}")
    assert abs(defined.mean() - 0.5) < 2 * error
    if not stratified:  # else folds differ little in what their models saw of each class
        assert np.mean(pooled) < 0.43


def test_a_perfect_ranking_gets_a_bound_from_the_pairs_within_folds() -> None:
    codes = np.arange(24)
    labels = codes % 2
    folds = codes // 2 % 4  # 3 + 3 patients a fold
    found = within_interval([[within_folds(labels, labels * 1.0, codes, folds, 24)]])
    assert found.interval == pytest.approx((0.05 ** (1 / 12), 1.0))
    assert within_interval([[within_folds(labels, labels * 1.0, codes, codes, 24)]]).auc is None


@settings(max_examples=50, deadline=None)
@given(samples())
def test_the_area_below_the_mean_curve_is_the_auc(sample) -> None:
    labels, scores, _, folds, _ = sample
    found = within_folds(*sample)
    if found.parts is None:
        return
    curves = []
    for one in found.folds:
        if one.auc is not None:
            rows = folds == one.fold
            x, y, _ = roc_curve(labels[rows], scores[rows], drop_intermediate=False)
            curves.append((x, y, one.pairs))
    mean = mean_roc(curves)
    assert (np.diff(mean.x) >= 0).all()
    assert (np.diff(mean.y) >= -1e-12).all()
    assert (mean.x[0], mean.x[-1], mean.y[-1]) == (0, 1, pytest.approx(1))
    assert np.trapezoid(mean.y, mean.x) == pytest.approx(found.auc, abs=1e-12)


def test_several_classes_are_averaged() -> None:
    rng = np.random.default_rng(5)
    codes = np.repeat(np.arange(60), 2)
    labels = codes % 3
    folds = codes // 3 % 4
    logits = rng.normal(size=(120, 3)) + np.eye(3)[labels]
    classes = [[within_folds(labels == k, logits[:, k], codes, folds, 60)] for k in range(3)]
    found = within_interval(classes, names=["a", "b", "c"])
    assert found.auc == pytest.approx(np.mean([one.auc for (one,) in classes if one.auc is not None]))
    assert found.interval is not None
    assert found.auc is not None
    assert found.interval[0] < found.auc < found.interval[1]
    assert found.warning is None
