from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torchvision.ops import sigmoid_focal_loss

from medtl_dist.errors import UserError
from medtl_dist.sections import Train
from medtl_dist.train.losses import balanced_class_weights, class_weights_of, loss_sum, loss_weight


def _batch(num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(40, num_classes, generator=generator)
    return logits, torch.randint(0, num_classes, (40,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_summed_loss_over_parts_is_torchs_weighted_mean(smoothing: float, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 3, generator=generator)
    labels = torch.randint(0, 3, (11,), generator=generator)
    weights = torch.tensor([0.5, 2.0, 1.5]) if weighted else None
    expected = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
    parts = [slice(0, 4), slice(4, 5), slice(5, 11)]
    total = sum(loss_sum(logits[p], labels[p], Train(label_smoothing=smoothing), weights) for p in parts)
    denominator = sum(loss_weight(labels[p], weights) for p in parts)
    assert float(total / denominator) == pytest.approx(float(expected), rel=1e-6)


def test_balanced_weights_are_scikit_learns() -> None:
    labels = [0] * 5 + [1] * 2 + [2] * 13
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 2]), y=labels)
    assert balanced_class_weights([5, 2, 13]) == pytest.approx(list(expected))
    assert balanced_class_weights([4, 0]) == [0.5, 0.0]
    assert math.isclose(sum(w * n for w, n in zip(balanced_class_weights([5, 2, 13]), [5, 2, 13], strict=True)), 20)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_loss_of_two_classes_is_torchvisions_on_the_difference_of_logits(gamma: float) -> None:
    logits, labels = _batch(2)
    logits.requires_grad_()
    config = Train(loss="focal", focal_gamma=gamma)
    weights = torch.tensor([0.5, 1.5])  # alpha_t of torchvision is 1/4 and 3/4
    ours = loss_sum(logits, labels, config, weights)
    theirs = 2 * sigmoid_focal_loss(
        logits[:, 1] - logits[:, 0], labels.float(), alpha=0.75, gamma=gamma, reduction="sum"
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (mine,) = torch.autograd.grad(ours, logits)
    (reference,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_loss_with_gamma_0_is_cross_entropy(smoothing: float) -> None:
    logits, labels = _batch(3)
    weights = torch.tensor([0.5, 2.0, 1.5])
    focal = Train(loss="focal", focal_gamma=0.0, label_smoothing=smoothing)
    plain = Train(label_smoothing=smoothing)
    for targets in (labels, F.one_hot(labels, 3).float()):
        torch.testing.assert_close(
            loss_sum(logits, targets, focal, weights), loss_sum(logits, targets, plain, weights), rtol=1e-5, atol=1e-4
        )


def test_focal_loss_of_several_classes_is_the_formula() -> None:
    logits, labels = _batch(4, seed=3)
    p = torch.softmax(logits.double(), dim=1).numpy()[np.arange(40), labels.numpy()]
    expected = float((-((1 - p) ** 2) * np.log(p)).sum())
    assert float(loss_sum(logits, labels, Train(loss="focal"), None)) == pytest.approx(expected, rel=1e-5)


def test_focal_loss_is_finite_where_the_network_is_sure() -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = loss_sum(logits, torch.tensor([0, 0]), Train(loss="focal", focal_gamma=0.5), None)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(400)
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_a_weight_of_the_positive_class_is_torchs_pos_weight() -> None:
    logits, labels = _batch(2)
    weights = torch.tensor(class_weights_of({"sick": 3.0}, ["well", "sick"], [1, 1]))
    reference = F.binary_cross_entropy_with_logits(
        logits[:, 1] - logits[:, 0], labels.float(), pos_weight=torch.tensor(3.0), reduction="sum"
    )
    torch.testing.assert_close(loss_sum(logits, labels, Train(), weights), reference, rtol=1e-5, atol=1e-4)
    assert loss_weight(labels, weights) == float((labels == 0).sum() + 3 * (labels == 1).sum())


def test_mixed_labels_weigh_as_their_parts_do() -> None:
    logits, labels = _batch(3)
    weights = torch.tensor([0.5, 2.0, 1.5])
    kept = torch.linspace(0, 1, 40)
    shares = kept[:, None] * F.one_hot(labels, 3) + (1 - kept)[:, None] * F.one_hot(labels.roll(1), 3)
    each = [F.cross_entropy(logits, one, weight=weights, reduction="none") for one in (labels, labels.roll(1))]
    expected = kept * each[0] + (1 - kept) * each[1]
    torch.testing.assert_close(loss_sum(logits, shares, Train(), weights), expected.sum(), rtol=1e-5, atol=1e-4)
    denominator = kept * weights[labels] + (1 - kept) * weights[labels.roll(1)]
    assert loss_weight(shares, weights) == pytest.approx(float(denominator.sum()), rel=1e-6)
    assert loss_weight(shares, None) == 40


def test_class_weights_by_name_leave_the_others_at_1_and_refuse_strangers() -> None:
    assert class_weights_of({"b": 2.5}, ["a", "b", "c"], [9, 9, 9]) == [1.0, 2.5, 1.0]
    assert class_weights_of("none", ["a", "b"], [9, 9]) is None
    assert class_weights_of("balanced", ["a", "b"], [1, 3]) == pytest.approx([2.0, 2 / 3])
    with pytest.raises(UserError, match=r"no class d in the data set; its classes: a, b\."):
        class_weights_of({"d": 2.0}, ["a", "b"], [1, 1])
