"""model → fit: the loss of a batch, and its share of the global denominator.

Targets are labels, int64 [batch], or shares of the classes, float32 [batch, classes] with rows that add to 1 (mixed images),
or label sets, int64 [batch, classes] of 1, 0 and -1 for unknown: then each class is a question of its own, and the loss is the
mean over the known answers, however they fall to images, ranks and parts of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medtl_dist.data.label_sets import UNKNOWN
from medtl_dist.errors import UserError
from medtl_dist.sections import Train


def loss_sum(logits: Tensor, targets: Tensor, config: Train, class_weights: Tensor | None) -> Tensor:
    """The config's loss summed over the batch; divided by the global :func:`loss_weight` it is the usual mean.

    Focal loss (Lin et al. 2017, equation 4, for any number of classes): ``-Σ_k w_k t_k (1 - p_k)^γ log p_k`` with the target
    shares ``t``, the class weights ``w`` and the softmax ``p``; γ = 0 is cross-entropy.

    Args:
        logits: [batch, classes], any float dtype; computed in float32.
        targets: see the module.
        class_weights: float32 [classes] or None; of label sets the weight of a class's positives, its negatives weighing 1.
    """
    logits = logits.float()
    if _are_sets(targets):
        return _binary_loss_sum(logits, targets, config, class_weights)
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


def _are_sets(targets: Tensor) -> bool:
    return targets.ndim == 2 and not targets.is_floating_point()


def _binary_loss_sum(logits: Tensor, sets: Tensor, config: Train, positive_weights: Tensor | None) -> Tensor:
    """Binary cross-entropy of every known answer, or its focal form ``-(1 - p_t)^γ log p_t`` (Lin et al. 2017, equation 4);
    a positive answer times its class's weight, as ``pos_weight`` of PyTorch's BCEWithLogitsLoss."""
    # log p_t of the right answer is log σ of its logit, signed. Unknown answers get logit 0, a constant: whatever the model
    # says there, NaN included, reaches neither the sum nor a gradient.
    signed = torch.where(sets == UNKNOWN, torch.zeros_like(logits), torch.where(sets == 1, logits, -logits))
    terms = -F.logsigmoid(signed)
    if config.loss == "focal":
        rest = torch.sigmoid(-signed).clamp_min(torch.finfo(torch.float32).tiny)
        terms = terms * rest**config.focal_gamma
    if positive_weights is not None:
        terms = terms * torch.where(sets == 1, positive_weights, torch.ones_like(positive_weights))
    return terms.masked_fill(sets == UNKNOWN, 0.0).sum()


def loss_weight(targets: Tensor, class_weights: Tensor | None) -> float:
    """The batch's share of the loss's denominator: its images, or the sum of their classes' weights; of label sets its known
    answers, whatever weighs them."""
    if _are_sets(targets):
        return float((targets != UNKNOWN).sum())
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


def positive_weights_of(
    given: str | Mapping[str, float], classes: Sequence[str], positives: Sequence[int], negatives: Sequence[int]
) -> list[float] | None:
    """``train.class_weights`` of label sets: the weight of each class's positives, None for none.

    Balanced: known negatives / positives, as PyTorch's BCEWithLogitsLoss advises for ``pos_weight``, so that both answers of a
    class weigh alike; 1 where the training images know only one of them. Raises UserError for a name that is no class.
    """
    if given == "balanced":
        pairs = zip(positives, negatives, strict=True)
        return [negative / positive if positive and negative else 1.0 for positive, negative in pairs]
    return class_weights_of(given, classes, positives)


def balanced_class_weights(counts: Sequence[int]) -> list[float]:
    """Weights ``n / (K · n_k)`` of ``K`` classes (scikit-learn's "balanced"); a class without images weighs 0."""
    total, num_classes = sum(counts), len(counts)
    return [total / (num_classes * count) if count else 0.0 for count in counts]
