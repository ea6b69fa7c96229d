"""model → fit: the optimiser's parameter groups, and the learning rate of every step.

The learning rate is a pure function of the step, so resuming needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from medtl_dist.models.registry import BackboneSpec, has_prefix
from medtl_dist.sections import Optim, Schedule


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


def parameter_groups(config: Optim, model: nn.Module, spec: BackboneSpec) -> list[dict[str, Any]]:
    """What learns, grouped by learning rate and weight decay: the head first, then the stages in the model's order.

    A group has ``params``, ``names`` (in the model), ``peak_lr`` and ``weight_decay``. Stage k of S (1: the stem) learns at
    ``backbone_lr · layer_decay ** (S + 1 - k)``, the head at ``lr`` (Howard and Ruder 2018, section 3.2; per stage as in
    Bao et al. 2022). Without ``decay_norms_and_biases``, a parameter of at most one dimension (a norm's scale or shift,
    a bias) has weight decay 0.
    """
    backbone_lr = config.backbone_lr or config.lr
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    places = {name: _stage_of(name, spec) for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Stable: within the head and within the backbone the model's own order stays, and with it that of every sum.
    for name in sorted(places, key=lambda name: places[name] is not None):
        parameter, stage = model.get_parameter(name), places[name]
        depth = 0 if stage is None else spec.num_stages + 1 - stage
        decays = config.decay_norms_and_biases or parameter.ndim > 1
        key = (-1.0 if stage is None else config.layer_decay**depth, decays)
        group = groups.setdefault(
            key,
            {
                "params": [],
                "names": [],
                "peak_lr": config.lr if stage is None else backbone_lr * config.layer_decay**depth,
                "weight_decay": config.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _stage_of(name: str, spec: BackboneSpec) -> int | None:
    """Number (from 1) of the stage that a parameter belongs to; None: the head."""
    if has_prefix(name, [spec.head]):
        return None
    return next(number for number, stage in enumerate(spec.stages, start=1) if has_prefix(name, stage))


def create_optimizer(config: Optim, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """SGD or AdamW over :func:`parameter_groups`."""
    own = [
        {key: value for key, value in group.items() if key != "names"} | {"lr": group["peak_lr"]} for group in groups
    ]
    if config.name == "sgd":
        return torch.optim.SGD(own, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(own, lr=config.lr)


def carry_over(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """``new`` with the state (momenta, counts of steps) that ``old`` has of the parameters that both hold."""
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]
    return new


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
