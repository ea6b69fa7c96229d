"""model → fit: which parameters move. Frozen stages neither learn nor drift; the rest is grouped for the optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from torch import nn

from medtl_dist.errors import UserError
from medtl_dist.models.spec import BackboneSpec, has_prefix


class ParameterCount(NamedTuple):
    total: int
    trainable: int


def resolve_depth(spec: BackboneSpec, frozen_depth: int | str) -> int:
    """``frozen_depth`` as a number of stages: 0 … len(spec.stages), "all" = every stage, so all but the head.

    Raises:
        UserError: anything else.
    """
    if frozen_depth == "all":
        return spec.num_stages
    if isinstance(frozen_depth, bool) or not isinstance(frozen_depth, int) or not 0 <= frozen_depth <= spec.num_stages:
        if spec.num_stages == 1:
            raise UserError(
                f"model.frozen_depth: {frozen_depth!r} is not a depth of {spec.name}, whose layers could not be told apart; "
                'give 0 (nothing frozen) or "all" (everything but the head)'
            )
        stages = ", ".join(f"{number} = {_named(stage)}" for number, stage in enumerate(spec.stages, start=1))
        raise UserError(
            f"model.frozen_depth: {frozen_depth!r} is not a depth of {spec.name}; give 0 (nothing frozen) to "
            f'{spec.num_stages} or "all" (everything but the head). Each depth adds a stage: {stages}'
        )
    return frozen_depth


def _named(stage: tuple[str, ...]) -> str:
    return " + ".join(stage) if len(stage) <= 3 else f"{stage[0]} + … + {stage[-1]}"


def freeze(model: nn.Module, spec: BackboneSpec, frozen_depth: int | str) -> None:
    """Freeze the first ``frozen_depth`` stages of the plain ``model`` and let everything else learn.

    Frozen parameters get ``requires_grad = False``; frozen modules are in eval mode and stay there whatever later
    calls ``train()`` on them, on the model or on a DDP wrapper around it, so BatchNorm statistics do not drift and
    dropout stays off. Call it before DDP wraps the model; called again, the new depth replaces the old one.

    How it stays: each frozen module carries a ``train`` of its own that ignores its argument. ``nn.Module.train``
    walks the tree by calling the children's ``train``, so every way in ends there. It adds no tensor, no hook and
    no time to a step, and as a ``functools.partial`` of a function of this module it is pickled and deep-copied with
    the model, bound to the copy.

    Raises:
        UserError: a depth that the backbone does not have.
    """
    frozen = _frozen_prefixes(spec, frozen_depth)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not has_prefix(name, frozen))
    for name, module in model.named_modules():
        module.__dict__.pop("train", None)
        if has_prefix(name, frozen):
            module.__dict__["train"] = partial(_stay_in_eval, module)
    model.train(model.training)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of ``module.train``: eval, whatever ``mode`` says."""
    return nn.Module.train(module, False)


def frozen_parameter_names(model: nn.Module, spec: BackboneSpec, frozen_depth: int | str) -> list[str]:
    """Names of the parameters in the first ``frozen_depth`` stages, in the model's order."""
    frozen = _frozen_prefixes(spec, frozen_depth)
    return [name for name, _ in model.named_parameters() if has_prefix(name, frozen)]


def trainable_groups(model: nn.Module, spec: BackboneSpec) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters that learn, by name: ``{"head": {...}, "backbone": {...}}``, the latter empty when all is frozen."""
    groups: dict[str, dict[str, nn.Parameter]] = {"head": {}, "backbone": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["head" if has_prefix(name, [spec.head]) else "backbone"][name] = parameter
    return groups


def frozen_names(names: Iterable[str], spec: BackboneSpec, frozen_depth: int | str) -> frozenset[str]:
    """Of the names in a model's state dict, those in the first ``frozen_depth`` stages: parameters and buffers."""
    frozen = _frozen_prefixes(spec, frozen_depth)
    return frozenset(name for name in names if has_prefix(name, frozen))


def count_parameters(model: nn.Module) -> ParameterCount:
    """Numbers of scalars in the model's parameters (buffers such as BatchNorm statistics are not counted)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns))


def _frozen_prefixes(spec: BackboneSpec, frozen_depth: int | str) -> list[str]:
    return [prefix for stage in spec.stages[: resolve_depth(spec, frozen_depth)] for prefix in stage]
