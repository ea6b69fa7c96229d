"""model → fit: the optimiser's parameter groups, the learning rate of every step, and the loss of a batch.

The learning rate is a pure function of the step, so resuming needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtl_dist.config import Optim, Schedule


def lr_factor(schedule: Schedule, *, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Share of the peak learning rate at optimiser step ``step`` (from 0); in (0, 1] but for a cosine's very end.

    Warm-up: ``(step + 1) / W`` for the first ``W = warmup_epochs · steps_per_epoch`` steps. After it: constant 1;
    step ``gamma ** (epoch // step_epochs)``; cosine ``f + (1 - f) · (1 + cos(π t)) / 2`` with ``t`` the share of the
    steps after warm-up (Loshchilov and Hutter 2017, equation 5, without restarts).
    """
    warmup = min(round(schedule.warmup_epochs * steps_per_epoch), epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "step":
        return schedule.gamma ** (step // steps_per_epoch // schedule.step_epochs)
    share = (step - warmup) / max(epochs * steps_per_epoch - warmup, 1)
    return schedule.final_fraction + (1 - schedule.final_fraction) * (1 + math.cos(math.pi * share)) / 2


def create_optimizer(
    config: Optim, *, head: Sequence[nn.Parameter], backbone: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters: a group for the head, another for what is trainable below it."""
    groups = [
        {"params": list(head), "lr": config.lr, "peak_lr": config.lr},
        {"params": list(backbone), "lr": config.backbone_lr or config.lr, "peak_lr": config.backbone_lr or config.lr},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def balanced_class_weights(counts: Sequence[int]) -> list[float]:
    """Weights ``n / (K · n_k)`` of ``K`` classes (scikit-learn's "balanced"); a class without images weighs 0."""
    total, num_classes = sum(counts), len(counts)
    return [total / (num_classes * count) if count else 0.0 for count in counts]


def loss_sum(logits: Tensor, labels: Tensor, *, class_weights: Tensor | None, label_smoothing: float) -> Tensor:
    """Cross-entropy summed over the batch; divided by the global :func:`loss_weight` it is the usual mean.

    Args:
        logits: [batch, classes], any float dtype; computed in float32.
        labels: int64 [batch].
        class_weights: float32 [classes] or None.
    """
    return F.cross_entropy(
        logits.float(), labels, weight=class_weights, label_smoothing=label_smoothing, reduction="sum"
    )


def loss_weight(labels: Tensor, class_weights: Tensor | None) -> float:
    """The batch's share of the loss's denominator: its images, or the sum of their classes' weights."""
    if class_weights is None:
        return float(labels.numel())
    return float(class_weights.cpu().double()[labels.cpu()].sum())
