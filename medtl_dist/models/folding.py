"""model → fit: frozen convolutions with the BatchNorm after them folded in; every saved tensor stays as it was.

In eval mode BatchNorm is a fixed scale and shift per channel: ``g · (conv(x, W) + b - μ) / √(σ² + ε) + β`` equals
``conv(x, W · s) + (b - μ) · s + β`` with ``s = g / √(σ² + ε)`` (computed in float64, rounded once). The modules keep
their parameters and buffers under their names; only what they compute changes, so state dicts, checkpoints and
weights files know nothing of folding.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import cast

import torch
from torch import Tensor, fx, nn

from medtl_dist.errors import UserError
from medtl_dist.models.freezing import resolve_depth
from medtl_dist.models.grey import GreyConv2d, pads_like_tensorflow, tensorflow_padding
from medtl_dist.models.spec import BackboneSpec, has_prefix


def fold_frozen(model: nn.Module, spec: BackboneSpec, frozen_depth: int | str) -> int:
    """Fold BatchNorm into the convolutions of the first ``frozen_depth`` stages, which `freeze` keeps in eval mode.

    Called again, the new depth replaces the old one; depth 0 undoes it. The folded weights are made when they are first
    needed and made anew whenever the tensors behind them have changed (weights loaded, model moved).

    Returns:
        The number of folded pairs.

    Raises:
        UserError: a depth that the backbone does not have, or a model that cannot be traced.
    """
    frozen = [name for stage in spec.stages[: resolve_depth(spec, frozen_depth)] for name in stage]
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            for name in ("forward", "folded"):
                module.__dict__.pop(name, None)
    pairs = [pair for pair in _pairs(model, spec) if all(has_prefix(name, frozen) for name in pair)] if frozen else []
    for conv_name, norm_name in pairs:
        conv, norm = (
            cast(nn.Conv2d, model.get_submodule(conv_name)),
            cast(nn.BatchNorm2d, model.get_submodule(norm_name)),
        )
        conv.__dict__["forward"] = partial(_folded_conv, conv, norm)
        norm.__dict__["forward"] = partial(_without_norm, norm)
    return len(pairs)


def _folded_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d, images: Tensor) -> Tensor:
    """In place of ``conv.forward``; it and `_without_norm` are partials, so copies of the model fold on their own."""
    weight, bias = _folded_weights(conv, norm)
    if isinstance(conv, GreyConv2d):
        return conv.forward_with(images, weight, bias)
    if pads_like_tensorflow(conv):
        images = nn.functional.pad(images, tensorflow_padding(images, conv))
    return conv._conv_forward(images, weight, bias)


def _without_norm(norm: nn.BatchNorm2d, images: Tensor) -> Tensor:
    """In place of ``norm.forward``: nothing, or what timm's norm does after normalising."""
    if not _has_activation(norm):
        return images
    return norm.get_submodule("act")(norm.get_submodule("drop")(images))


def _folded_weights(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the pair as one convolution, kept until a tensor that they were made from has changed."""
    sources = [*conv.parameters(), *norm.parameters(), *norm.buffers()]
    state = [(source.data_ptr(), source._version) for source in sources]
    kept = conv.__dict__.get("folded")
    if kept is None or kept[0] != state:
        kept = (state, *_fold(conv, norm))
        conv.__dict__["folded"] = kept
    return kept[1], kept[2]


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    weight = torch.cat([conv.weight, conv.offset], dim=1) if isinstance(conv, GreyConv2d) else conv.weight
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    shift = (conv.bias.double() if conv.bias is not None else 0.0) - norm.running_mean.double()
    bias = shift * scale + (norm.bias.double() if norm.affine else 0.0)
    return (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype), bias.to(weight.dtype)


def _pairs(model: nn.Module, spec: BackboneSpec) -> list[tuple[str, str]]:
    """(convolution, norm): the norm is all that reads the convolution's output, and each is used once."""
    try:
        graph = _Layers().trace(model)
    except Exception as error:  # a model's own code meets stand-ins for tensors: anything may come of it
        reason = str(error).partition("\n")[0][:120]
        raise UserError(
            f"model.fold_frozen=true: the forward pass of {spec.name} cannot be traced ({type(error).__name__}: {reason}); "
            "set model.fold_frozen=false"
        ) from None
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    modules = dict(model.named_modules())
    pairs: list[tuple[str, str]] = []
    for node in calls:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        conv_name, norm_name = str(source.target), str(node.target)
        if times[conv_name] == times[norm_name] == 1 and _foldable(modules[conv_name], modules[norm_name]):
            pairs.append((conv_name, norm_name))
    return pairs


def _foldable(conv: nn.Module, norm: nn.Module) -> bool:
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d) or norm.running_var is None:
        return False
    known_conv = type(conv) is nn.Conv2d or isinstance(conv, GreyConv2d) or pads_like_tensorflow(conv)
    known_norm = type(norm) is nn.BatchNorm2d or _has_activation(norm)
    return known_conv and known_norm and conv.padding_mode == "zeros"


def _has_activation(norm: nn.Module) -> bool:
    return type(norm).__name__ == "BatchNormAct2d"  # timm's; by name, since timm need not be installed


class _Layers(fx.Tracer):
    """Down to single layers; ours and timm's count as layers too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)
