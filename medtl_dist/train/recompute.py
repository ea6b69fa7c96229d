"""model → fit: activation checkpointing, a stage's activations computed again in the backward pass instead of kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from medtl_dist.models.registry import BackboneSpec


def recompute_stages(model: nn.Module, spec: BackboneSpec) -> None:
    """Keep only what goes into and comes out of each stage that learns. Same numbers, about a third more computing.

    Stages made of single layers gain nothing and stay as they are. No tensor is added, so checkpoints don't change; frozen
    stages keep no activations anyhow, and a copy of the model recomputes with its own modules.
    """
    modules = dict(model.named_modules())
    for name in (name for stage in spec.stages for name in stage):
        module = modules.get(name)  # None: a single parameter
        if module is not None and any(True for _ in module.children()):
            module.__dict__["forward"] = partial(_forward, module)


def _forward(module: nn.Module, *inputs: Any) -> Any:
    """In place of ``module.forward``."""
    plain = partial(type(module).forward, module)
    if not (module.training and torch.is_grad_enabled()):
        return plain(*inputs)
    contexts = partial(_contexts, module)
    return checkpoint(plain, *inputs, use_reentrant=False, context_fn=contexts)


def _contexts(
    module: nn.Module,
) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """Of the forward pass, and of its repetition."""
    return contextlib.nullcontext(), _still_statistics(module)


@contextlib.contextmanager
def _still_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm as in training, but its running statistics, which have seen this batch already, don't move."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
