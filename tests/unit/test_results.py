from __future__ import annotations

import numpy as np
import pytest
from shard_sets import write_set

from medtl_dist.config import load_config
from medtl_dist.train import results
from medtl_dist.train.evaluate import Predictions


@pytest.mark.parametrize(
    ("unit", "aggregate", "expected"), [("image", "mean", -3.5), ("patient", "max", 2.0), ("patient", "mean", -0.75)]
)
def test_the_threshold_is_fixed_at_the_configured_unit(
    tmp_path, monkeypatch, unit: str, aggregate: str, expected: float
) -> None:
    """Patient a (positive) scores 3 and -2, patient b (negative) 1 and -5; a threshold lies half-way between neighbours."""
    dataset = write_set(tmp_path / "set", {"train": [4], "val": [4]})
    monkeypatch.setattr(results, "groups_of", lambda _dataset, _split: np.array(["a", "a", "b", "b"]))
    logits = np.array([3.0, -2.0, 1.0, -5.0])
    val = Predictions(list("wxyz"), np.array([1, 1, 0, 0]), np.stack([np.zeros(4), logits], axis=1))
    config = load_config(overrides=[f"evaluate.unit={unit}", f"evaluate.aggregate={aggregate}"])
    threshold = results.fix_threshold(config, dataset, val)
    assert threshold is not None
    assert threshold["logit"] == pytest.approx(expected)


def test_one_class_in_val_has_no_threshold(tmp_path) -> None:
    dataset = write_set(tmp_path / "set", {"train": [4], "val": [4]})
    val = Predictions(list("wxyz"), np.ones(4, np.int64), np.zeros((4, 2)))
    assert results.fix_threshold(load_config(), dataset, val) is None


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ((), None),
        (("train.loss=focal",), "focal loss"),
        (("train.loss=focal", "train.focal_gamma=0"), None),
        (("train.class_weights={NORMAL: 2}", "augment.cutmix_alpha=1"), "class weights and cutmix"),
        (("train.label_smoothing=0.1", "augment.mixup_alpha=0.2"), "label smoothing and mixup"),
    ],
)
def test_what_shifts_scores_is_said_beside_them(tmp_path, overrides: tuple[str, ...], named: str | None) -> None:
    dataset = write_set(tmp_path / "set", {"train": [4], "val": [4]})
    found = results.cautions(load_config(overrides=overrides), dataset, "imagenet", {"test": {}})
    expected = f"Trained with {named}: scores are not calibrated probabilities until corrected on val."
    assert found == ([expected] if named else [])
