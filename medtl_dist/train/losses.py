"""model → fit: the loss of a batch, and its share of the global denominator.

Targets are labels, int64 [batch], or shares of the classes, float32 [batch, classes] with rows that add to 1 (mixed images).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medtl_dist.config import Train
from medtl_dist.errors import UserError


def loss_sum(logits: Tensor, targets: Tensor, config: Train, class_weights: Tensor | None) -> Tensor:
    """The config's loss summed over the batch; divided by the global :func:`loss_weight` it is the usual mean.

    Focal loss (Lin et al. 2017, equation 4, for any number of classes): ``-Σ_k w_k t_k (1 - p_k)^γ log p_k`` with the target
    shares ``t``, the class weights ``w`` and the softmax ``p``; γ = 0 is cross-entropy.

    Args:
        logits: [batch, classes], any float dtype; computed in float32.
        targets: see the module.
        class_weights: float32 [classes] or None.
    """
    logits = logits.float()
    if config.loss == "cross_entropy":
        return F.cross_entropy(
            logits, targets, weight=class_weights, label_smoothing=config.label_smoothing, reduction="sum"
        )
    num_classes = logits.shape[1]
    shares = targets if targets.is_floating_point() else F.one_hot(targets, num_classes).float()
    shares = shares * (1 - config.label_smoothing) + config.label_smoothing / num_classes
    log_p = F.log_softmax(logits, dim=1)
    # 1 - p as -expm1(log p): exact where p is nearly 1, which is where γ matters. Its power has an infinite slope at 0
    # for γ < 1, hence the smallest normal number below it.
    rest = (-torch.expm1(log_p)).clamp_min(torch.finfo(torch.float32).tiny)
    weighted = shares if class_weights is None else shares * class_weights
    return -(weighted * rest**config.focal_gamma * log_p).sum()


def loss_weight(targets: Tensor, class_weights: Tensor | None) -> float:
    """The batch's share of the loss's denominator: its images, or the sum of their classes' weights."""
    if class_weights is None:
        return float(targets.shape[0])
    weights = class_weights.cpu().double()
    if targets.is_floating_point():
        return float((targets.cpu().double() @ weights).sum())
    return float(weights[targets.cpu()].sum())


def class_weights_of(
    given: str | Mapping[str, float], classes: Sequence[str], counts: Sequence[int]
) -> list[float] | None:
    """``train.class_weights`` as a weight per class, None for none. ``counts``: training images of each class.

    Raises UserError for a name that is no class.
    """
    if given == "none":
        return None
    if isinstance(given, str):
        return balanced_class_weights(counts)
    unknown = sorted(set(given) - set(classes))
    if unknown:
        raise UserError(
            f"train.class_weights: no class {', '.join(unknown)} in the data set; its classes: {', '.join(classes)}."
        )
    return [float(given.get(name, 1.0)) for name in classes]


def balanced_class_weights(counts: Sequence[int]) -> list[float]:
    """Weights ``n / (K · n_k)`` of ``K`` classes (scikit-learn's "balanced"); a class without images weighs 0."""
    total, num_classes = sum(counts), len(counts)
    return [total / (num_classes * count) if count else 0.0 for count in counts]
