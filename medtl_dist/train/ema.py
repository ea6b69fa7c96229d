"""fit → fit: a moving average of the weights, kept beside the model that learns; it is the one that is scored."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Ema:
    """The averaged ``model``, in the learning model's mode and never updated but by :func:`update`."""

    model: nn.Module
    decay: float
    num_updates: int = 0


def ema_of(model: nn.Module, decay: float) -> Ema:
    """An average that has seen nothing yet: a copy of the plain ``model``."""
    return Ema(copy.deepcopy(model), decay)


@torch.no_grad()
def update(ema: Ema, model: nn.Module) -> None:
    """Take in the model's present state, after an optimiser step.

    After t updates the average is ``Σ d^(t-i) θ_i / Σ d^(t-i)`` over i = 1 … t: the bias correction of Kingma and Ba
    (2015, section 3) folded into the factor, so the initial weights (a random head, say) have no part in it. Running
    statistics of BatchNorm are averaged alike, since they belong to the weights they were seen with; counters are copied.
    Equal values stay equal to the bit, so what is frozen is the same in both.
    """
    ema.num_updates += 1
    share = (1.0 - ema.decay) / (1.0 - ema.decay**ema.num_updates)
    averaged, learning = list(ema.model.state_dict().values()), list(model.state_dict().values())
    floating = [position for position, tensor in enumerate(averaged) if tensor.is_floating_point()]
    # One kernel for all, as torch.optim.swa_utils does it: a network has hundreds of tensors.
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        [averaged[i] for i in floating], [learning[i] for i in floating], share
    )
    for position in set(range(len(averaged))) - set(floating):
        averaged[position].copy_(learning[position])
