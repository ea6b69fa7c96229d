"""Several labels an image against independent references: PyTorch's losses, scikit-learn, plain loops over what is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_weights import weights_in
from label_tables import CLASSES, write_label_table
from ranks import run_ranks
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score
from tiny_backbone import tiny_registered
from torchvision.ops import sigmoid_focal_loss

from medtl_dist.config import Config, load_config
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import open_dataset, read_split
from medtl_dist.data.sources import Columns
from medtl_dist.errors import Interrupted, UserError
from medtl_dist.metrics import bootstrap, intervals
from medtl_dist.metrics.multilabel import fix_thresholds, summarise_label_sets
from medtl_dist.metrics.operating import choose_threshold
from medtl_dist.report.build import build_report
from medtl_dist.run import Folder, LocalRun, Signal
from medtl_dist.sections import Train
from medtl_dist.train.evaluate import binary_cross_entropy
from medtl_dist.train.loop import fit
from medtl_dist.train.losses import loss_sum, loss_weight, positive_weights_of
from medtl_dist.train.rescore import evaluate_run
from medtl_dist.train.start import _class_weights, check_inputs

NAMES = ("a", "b", "c")


def _random_sets(num: int, seed: int, num_classes: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label sets with unknowns, logits that know something, and patients of one to four images."""
    rng = np.random.default_rng(seed)
    sets = rng.integers(-1, 2, (num, num_classes))
    logits = rng.normal(size=sets.shape).round(1) + 0.5 * (sets == 1)
    return sets, logits, np.sort(rng.integers(0, max(2, num // 3), num))


# --- the loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [None, 2.0, 0.5])
def test_the_loss_over_parts_is_torchs_over_the_known_entries(weighted: bool, gamma: float | None) -> None:
    sets, values, _ = (torch.from_numpy(a) for a in _random_sets(23, 0))
    logits = (3 * values).float().requires_grad_()
    weights = torch.tensor([0.5, 4.0, 1.5]) if weighted else None
    known = sets != -1
    targets = (sets == 1).float()
    if gamma is None:
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=weights, reduction="none"
        )
    else:
        each = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=gamma)
        each = each * torch.where(sets == 1, 1.0 if weights is None else weights, torch.ones(3))
    expected = each[known].mean()
    (wanted,) = torch.autograd.grad(expected, logits)
    config = Train() if gamma is None else Train(loss="focal", focal_gamma=gamma)
    parts = [slice(0, 3), slice(3, 4), slice(4, 23)]
    total = torch.stack([loss_sum(logits[p], sets[p], config, weights) for p in parts]).sum()
    mean = total / sum(loss_weight(sets[p], weights) for p in parts)
    assert mean.item() == pytest.approx(expected.item(), rel=1e-5)
    (found,) = torch.autograd.grad(mean, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert not found[~known].any()


@pytest.mark.parametrize("config", [Train(), Train(loss="focal"), Train(loss="focal", focal_gamma=0.5)])
def test_whatever_stands_at_an_unknown_entry_reaches_neither_loss_nor_gradient(config: Train) -> None:
    sets = torch.tensor([[1, -1, 0], [-1, -1, 1]])
    results = []
    for noise in (0.0, 1e4, -1e4, float("nan"), float("inf")):
        logits = torch.tensor([[0.3, noise, -2.0], [noise, noise, 0.1]], requires_grad=True)
        loss = loss_sum(logits, sets, config, torch.tensor([2.0, 3.0, 4.0]))
        loss.backward()
        assert logits.grad is not None
        assert not logits.grad[sets == -1].any()
        results.append((loss.item(), logits.grad[sets != -1].tolist()))
    assert all(result == results[0] for result in results)


def test_balanced_weights_are_negatives_over_positives() -> None:
    assert positive_weights_of("balanced", NAMES, [10, 4, 0], [30, 2, 7]) == [3.0, 0.5, 1.0]
    assert positive_weights_of("balanced", NAMES, [10, 4, 3], [30, 2, 0]) == [3.0, 0.5, 1.0]
    assert positive_weights_of({"b": 5.0}, NAMES, [1, 1, 1], [1, 1, 1]) == [1.0, 5.0, 1.0]
    assert positive_weights_of("none", NAMES, [1, 1, 1], [1, 1, 1]) is None
    with pytest.raises(UserError, match="no class d"):
        positive_weights_of({"d": 5.0}, NAMES, [1, 1, 1], [1, 1, 1])


def test_the_evaluated_loss_is_torchs() -> None:
    sets, logits, _ = _random_sets(40, 1)
    known = sets != -1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits[known]), torch.from_numpy((sets[known] == 1).astype(np.float64))
    )
    assert binary_cross_entropy(logits, sets) == pytest.approx(float(expected), rel=1e-12)


# --- the numbers


def _entry(sets: np.ndarray, logits: np.ndarray, groups: np.ndarray | None, **changed: Any) -> dict:
    options = {"unit": "image", "aggregate": "mean", "num_bootstrap": 100, "loss": None}
    fixed = {"classes": NAMES, "sets": sets, "logits": logits, "groups": groups}
    options |= changed
    level = {name: options[name] for name in ("unit", "aggregate")}
    thresholds = fix_thresholds(**fixed, **level, sensitivity=None)
    return summarise_label_sets(**fixed, **options, thresholds=thresholds)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_each_class_is_scikit_learns_over_its_known_rows(seed: int) -> None:
    sets, logits, groups = _random_sets(60, seed)
    entry = _entry(sets, logits, groups)
    for k, name in enumerate(NAMES):
        rows = sets[:, k] != -1
        truth, scores, row = sets[rows, k], logits[rows, k], entry["per_class"][name]
        assert row["auc"] == pytest.approx(roc_auc_score(truth, scores), rel=1e-12)
        assert row["average_precision"] == pytest.approx(average_precision_score(truth, scores), rel=1e-12)
        assert row["auc_ci"] == list(intervals.auc_interval(truth, scores, groups[rows]).interval or ())
        assert (row["n"], row["n_unknown"]) == (rows.sum(), 60 - rows.sum())
        assert row["prevalence"] == truth.mean()
        assert row["brier"] == pytest.approx(np.mean((1 / (1 + np.exp(-scores)) - truth) ** 2), rel=1e-12)
        assert row["threshold"] == choose_threshold(truth, scores)
        called = scores >= row["threshold"]["logit"]
        assert row["confusion"] == confusion_matrix(truth, called).tolist()
        assert sum(some["n"] for some in row["calibration"]) == rows.sum()
    aucs = [entry["per_class"][name]["auc"] for name in NAMES]
    assert entry["auc"] == entry["macro"]["auc"] == pytest.approx(np.mean(aucs), rel=1e-12)
    assert entry["macro"]["n_defined"] == 3
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry


def test_a_class_without_both_answers_is_left_out_of_the_mean() -> None:
    sets, logits, groups = _random_sets(60, 3)
    sets[sets[:, 1] == 0, 1] = -1
    entry = _entry(sets, logits, groups)
    assert entry["per_class"]["b"]["auc"] is None
    assert entry["per_class"]["b"]["threshold"] is None
    assert entry["macro"]["n_defined"] == 2
    assert entry["auc"] == pytest.approx(np.mean([entry["per_class"][name]["auc"] for name in "ac"]))
    sets[:] = -1
    empty = _entry(sets, logits, groups)
    assert empty["auc"] is None
    assert empty["auc_undefined"] == "undefined: no class has a positive and a negative image that are known"
    assert binary_cross_entropy(logits, sets) == 0.0


@pytest.mark.parametrize("grouped", [True, False])
def test_the_macro_interval_with_one_defined_class_is_that_classes(grouped: bool) -> None:
    sets, logits, groups = _random_sets(60, 4)
    sets[:, 1:] = np.where(sets[:, 1:] == 0, -1, sets[:, 1:])
    entry = _entry(sets, logits, groups if grouped else None)
    assert entry["auc_ci"] == pytest.approx(entry["per_class"]["a"]["auc_ci"], rel=1e-12)


def test_the_macro_interval_adds_a_patients_classes_before_squaring() -> None:
    """Plain loops over patients: the variance of the mean as a sum of squares of each patient's share, by definition."""
    sets, logits, groups = _random_sets(70, 5)
    patients = np.unique(groups)
    share = dict.fromkeys(patients.tolist(), 0.0)
    aucs = []
    for k in range(3):
        positives = [(x, g) for x, g, label in zip(logits[:, k], groups, sets[:, k], strict=True) if label == 1]
        negatives = [(y, g) for y, g, label in zip(logits[:, k], groups, sets[:, k], strict=True) if label == 0]
        wins = np.array([[float(x > y) + 0.5 * (x == y) for y, _ in negatives] for x, _ in positives])
        aucs.append(wins.mean())
        for number, placed in enumerate((positives, negatives)):
            of = len({g for _, g in placed})
            values = wins.mean(axis=1 - number) - aucs[-1]
            for (_, g), value in zip(placed, values, strict=True):
                share[int(g)] += np.sqrt(of / (of - 1)) * value / len(placed) / 3
    variance = sum(value**2 for value in share.values())
    expected = intervals.logit_interval(float(np.mean(aucs)), variance)
    assert _entry(sets, logits, groups)["auc_ci"] == pytest.approx(list(expected), rel=1e-9)


def test_the_bootstrap_draws_patients_and_their_known_answers() -> None:
    """Each replicate's AUC of a class against weights expanded to rows; the draws are those of the full scoring."""
    sets, logits, groups = _random_sets(40, 6)
    known = sets[:, 0] != -1
    strata = np.zeros(40, np.int64)
    draws = next(iter(bootstrap._draws(np.zeros(len(np.unique(groups)), np.int64), 20, 20, 3)))
    codes = np.unique(groups, return_inverse=True)[1]
    found = bootstrap.replicate_aucs(
        strata, [(sets[:, 0] == 1, logits[:, 0])], groups, num_replicates=20, seed=3, known=[known]
    )
    rows = np.flatnonzero(known)
    for weights, auc in zip(draws, found[:, 0], strict=True):
        often = weights[codes[rows]].astype(int)
        repeated = np.repeat(rows, often)
        assert auc == pytest.approx(roc_auc_score(sets[repeated, 0], logits[repeated, 0]), rel=1e-12)


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_patients_are_judged_by_their_known_images(aggregate: str) -> None:
    sets, logits, groups = _random_sets(60, 7)
    entry = _entry(sets, logits, groups, unit="patient", aggregate=aggregate)
    for k, name in enumerate(NAMES):
        truth, scores = [], []
        for patient in np.unique(groups):
            rows = (groups == patient) & (sets[:, k] != -1)
            if rows.any():
                truth.append(int((sets[rows, k] == 1).any()))
                scores.append(getattr(np, aggregate)(logits[rows, k]))
        row = entry["per_class"][name]
        assert (row["n"], row["n_positive"]) == (len(truth), sum(truth))
        assert row["auc"] == pytest.approx(roc_auc_score(truth, scores), rel=1e-12)
        assert row["n"] + row["n_unknown"] == entry["n"] == len(np.unique(groups))
    assert entry["other_level"]["unit"] == "image"
    with pytest.raises(UserError, match="no patient groups"):
        _entry(sets, logits, None, unit="patient")


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num=st.integers(1, 30),
    unit=st.sampled_from(("image", "patient")),
    noise=st.floats(-50, 50),
)
def test_an_unknown_answer_changes_no_number(seed: int, num: int, unit: str, noise: float) -> None:
    """The sentence of the module's docstring, for any sets: whatever the model says of the unknown, every number stays."""
    sets, logits, groups = _random_sets(num, seed)
    other = np.where(sets == -1, noise + np.arange(logits.size).reshape(logits.shape), logits)
    for aggregate in ("mean", "max"):
        entries = [_entry(sets, z, groups, unit=unit, aggregate=aggregate, num_bootstrap=20) for z in (logits, other)]
        assert entries[0] == entries[1]
    assert binary_cross_entropy(logits, sets) == binary_cross_entropy(other, sets)


def test_all_known_and_exclusive_labels_give_the_one_vs_rest_numbers() -> None:
    """Where every image has exactly one class, each question is that class against the rest, as with several classes."""
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 3, 50)
    logits = rng.normal(size=(50, 3))
    entry = _entry(np.eye(3, dtype=int)[labels], logits, None)
    assert entry["auc"] == pytest.approx(
        np.mean([roc_auc_score(labels == k, logits[:, k]) for k in range(3)]), rel=1e-12
    )
    assert not any(row["n_unknown"] for row in entry["per_class"].values())


# --- training


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("multilabel")
    table = write_label_table(folder, 72, patients=24, splits=("train", "train", "val", "test"))
    columns = Columns(labels=CLASSES, group=("patient_id",), domain="site", split="split")
    return pack(table, folder / "set", PackOptions(columns=columns, num_workers=1, image_size_px=32)).folder


def _config(shards: str, *overrides: str) -> Config:
    fixed = ("model.backbone=tiny", "model.weights=random", "train.epochs=2", "train.threads=1", "optim.momentum=0.9")
    fixed = (*fixed, "data.global_batch_size=12", "evaluate.bootstrap_samples=50", "train.class_weights=balanced")
    return load_config(preset="smoke", overrides=[f"data.shards={shards}", *fixed, *overrides])


class _StoppedRun(LocalRun):
    polls = 0

    def poll(self) -> Signal:
        self.polls += 1
        if self.polls == 1:
            self.received = 15
        return super().poll()


def _train(rank: int, world_size: int, config: Config, folder: str) -> None:
    with tiny_registered():
        fit(config, LocalRun(Folder.local(Path(folder)), torch.device("cpu"), rank, world_size, rank))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").iterdir())
    return weights_in(newest)


def _history(folder: Path) -> list[dict]:
    names = ("epoch", "train_loss", "val_auc", "val_loss", "val_average_precision")
    return pq.read_table(folder / "history.parquet").select(names).to_pylist()


def test_ranks_and_parts_give_the_loss_of_one_process(shards: str, tmp_path: Path) -> None:
    """Norms frozen, so that only the loss's denominator could differ: the known answers of the whole batch, not of a part."""
    config = _config(shards, "model.frozen_depth=all", "optim.name=sgd", "train.epochs=1")
    _train(0, 1, config, str(tmp_path / "one"))
    run_ranks(2, _train, config, str(tmp_path / "two"))
    _train(
        0,
        1,
        config.model_copy(update={"train": config.train.model_copy(update={"accumulation_steps": 3})}),
        str(tmp_path / "parts"),
    )
    reference, history = _weights(tmp_path / "one"), _history(tmp_path / "one")
    for other in ("two", "parts"):
        for key, tensor in _weights(tmp_path / other).items():
            torch.testing.assert_close(tensor, reference[key], rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(_history(tmp_path / other), history, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)


def test_a_stopped_and_resumed_run_equals_the_undisturbed_one(shards: str, tmp_path: Path) -> None:
    config = _config(shards, "data.global_batch_size=6", "train.epochs=2")
    with tiny_registered():
        fit(config, LocalRun(Folder.local(tmp_path / "whole"), torch.device("cpu")))
        with pytest.raises(Interrupted):
            fit(config, _StoppedRun(Folder.local(tmp_path / "stopped"), torch.device("cpu")))
        fit(config, LocalRun(Folder.local(tmp_path / "stopped"), torch.device("cpu")))
    again = _weights(tmp_path / "stopped")
    assert all(torch.equal(again[key], tensor) for key, tensor in _weights(tmp_path / "whole").items())
    assert _history(tmp_path / "stopped") == _history(tmp_path / "whole")


def test_balanced_weights_are_of_the_training_images(shards: str) -> None:
    dataset = open_dataset(shards)
    sets = read_split(dataset, "train", ["label"]).column("label").to_pylist()
    counts = [[sum(row[k] == value for row in sets) for value in (0, 1)] for k in range(3)]
    found = _class_weights(_config(shards), dataset, torch.device("cpu"))
    assert found is not None
    assert found.tolist() == pytest.approx([negatives / positives for negatives, positives in counts])


def test_results_predictions_rescoring_and_report(shards: str, tmp_path: Path) -> None:
    config = _config(shards, "train.epochs=1")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    _train(0, 1, config, str(tmp_path))
    table = pq.read_table(tmp_path / "predictions" / "val.parquet").to_pydict()
    sets = np.array([[-1 if v is None else v for v in table[f"label_{name}"]] for name in CLASSES]).T
    logits = np.array([table[f"logit_{name}"] for name in CLASSES]).T
    assert (sets == -1).any()
    assert pytest.approx(1 / (1 + np.exp(-logits))) == np.array([table[f"score_{name}"] for name in CLASSES]).T
    results = json.loads((tmp_path / "results.json").read_text())
    entry = results["splits"]["val"]
    aucs = [roc_auc_score(sets[rows, k], logits[rows, k]) for k in range(3) for rows in [sets[:, k] != -1]]
    assert entry["auc"] == pytest.approx(np.mean(aucs), rel=1e-9)
    assert entry["loss"] == pytest.approx(binary_cross_entropy(logits, sets), rel=1e-9)
    assert results["threshold"] is None
    assert set(results["thresholds"]) == set(CLASSES)
    with tiny_registered():
        run = LocalRun(Folder.local(tmp_path), torch.device("cpu"))
        assert evaluate_run(run, "val") == entry
        test = evaluate_run(run, "test")
    assert test["per_class"]["Mass"]["threshold"] == results["thresholds"]["Mass"]
    page = build_report(tmp_path).read_text()
    assert "Each class, with it against without" in page
    assert "Each class against images known to be without it" in page
    assert "binary cross-entropy" in page
    for name in CLASSES:
        assert name in page


def test_a_report_of_two_classes_is_not_one_of_a_binary_task(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    table = write_label_table(folder, 48, patients=24, splits=("train", "val"))
    columns = Columns(labels=CLASSES[:2], group=("patient_id",), split="split")
    packed = pack(table, tmp_path / "set", PackOptions(columns=columns, num_workers=1, image_size_px=32))
    run = tmp_path / "run"
    run.mkdir()
    config = _config(packed.folder, "train.epochs=1")
    (run / "config.yaml").write_text(config.to_yaml())
    _train(0, 1, config, str(run))
    page = build_report(run).read_text()
    assert "2 classes, an image may have several" in page
    assert "Mass against Effusion" not in page


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("augment.mixup_alpha=0.2", "give augment.mixup_alpha=0 and augment.cutmix_alpha=0"),
        ("augment.cutmix_alpha=0.2", "give augment.mixup_alpha=0 and augment.cutmix_alpha=0"),
        ("train.label_smoothing=0.1", "give train.label_smoothing=0"),
        ("data.sampling=class", "may have several classes"),
    ],
)
def test_what_has_no_meaning_is_refused(shards: str, override: str, message: str, tmp_path: Path) -> None:
    with tiny_registered(), pytest.raises(UserError, match=message):
        check_inputs(_config(shards, "train.class_weights=none", override))
    with pytest.raises(UserError, match=message):
        _train(0, 1, _config(shards, "train.class_weights=none", override), str(tmp_path))
