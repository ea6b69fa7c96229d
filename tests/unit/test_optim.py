from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from medtl_dist.config import Optim, Schedule
from medtl_dist.train.optim import balanced_class_weights, create_optimizer, loss_sum, loss_weight, lr_factor, set_lr


def _factors(schedule: Schedule, steps_per_epoch: int, epochs: int) -> list[float]:
    return [
        lr_factor(schedule, step=s, steps_per_epoch=steps_per_epoch, epochs=epochs)
        for s in range(steps_per_epoch * epochs)
    ]


@settings(deadline=None, max_examples=30)
@given(steps=st.integers(1, 7), epochs=st.integers(1, 9), warmup=st.floats(0, 3))
def test_cosine_is_torchs_after_warm_up(steps: int, epochs: int, warmup: float) -> None:
    factors = _factors(Schedule(name="cosine", warmup_epochs=warmup, final_fraction=0.1), steps, epochs)
    num_warm = min(round(warmup * steps), steps * epochs)
    assert factors[:num_warm] == pytest.approx([(s + 1) / num_warm for s in range(num_warm)])
    rest = steps * epochs - num_warm
    if rest:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=rest, eta_min=0.1)
        expected = []
        for _ in range(rest):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            reference.step()
        assert factors[num_warm:] == pytest.approx(expected, abs=1e-9)


def test_step_drops_at_whole_epochs_as_torch_does() -> None:
    factors = _factors(Schedule(name="step", step_epochs=3, gamma=0.1), 4, 10)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
    for epoch in range(10):
        assert factors[4 * epoch : 4 * epoch + 4] == pytest.approx([optimizer.param_groups[0]["lr"]] * 4)
        optimizer.step()
        reference.step()


def test_constant_is_one_after_warm_up() -> None:
    assert _factors(Schedule(name="constant", warmup_epochs=0.5), 4, 2) == [0.5, 1, 1, 1, 1, 1, 1, 1]


def test_head_and_backbone_keep_their_own_peaks() -> None:
    head, backbone = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    for config in (Optim(name="sgd", lr=0.2, backbone_lr=0.05), Optim(name="adamw", lr=0.2, backbone_lr=0.05)):
        optimizer = create_optimizer(config, head=[head], backbone=[backbone])
        set_lr(optimizer, 0.5)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.025]
    assert len(create_optimizer(Optim(), head=[head], backbone=[]).param_groups) == 1
    assert {g["lr"] for g in create_optimizer(Optim(lr=0.3), head=[head], backbone=[backbone]).param_groups} == {0.3}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_summed_loss_over_parts_is_torchs_weighted_mean(smoothing: float, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 3, generator=generator)
    labels = torch.randint(0, 3, (11,), generator=generator)
    weights = torch.tensor([0.5, 2.0, 1.5]) if weighted else None
    expected = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
    parts = [slice(0, 4), slice(4, 5), slice(5, 11)]
    total = sum(loss_sum(logits[p], labels[p], class_weights=weights, label_smoothing=smoothing) for p in parts)
    denominator = sum(loss_weight(labels[p], weights) for p in parts)
    assert float(total / denominator) == pytest.approx(float(expected), rel=1e-6)


def test_balanced_weights_are_scikit_learns() -> None:
    labels = [0] * 5 + [1] * 2 + [2] * 13
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 2]), y=labels)
    assert balanced_class_weights([5, 2, 13]) == pytest.approx(list(expected))
    assert balanced_class_weights([4, 0]) == [0.5, 0.0]
    assert math.isclose(sum(w * n for w, n in zip(balanced_class_weights([5, 2, 13]), [5, 2, 13], strict=True)), 20)
