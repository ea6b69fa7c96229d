"""model, timm's part of the registry: ``timm/NAME`` as a record, read off the model that timm builds.

Building needs no network. Stages are timm's own coarse grouping of the weights, checked on the traced model; where
one of its cuts is not a single tensor, everything but the head is one stage.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from medtl_dist.errors import UserError
from medtl_dist.models.spec import BackboneSpec, has_prefix
from medtl_dist.models.split import separable


@lru_cache(maxsize=32)
def timm_spec(name: str) -> BackboneSpec:
    """The record of timm's model ``name`` (with or without the tag of its weights: ``vit_tiny_patch16_224.augreg_in21k``).

    Raises:
        UserError: timm is not installed, has no such model, or the model does not end in one linear head.
    """
    model = _on_meta(name)
    told: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    head, first_conv = told.get("classifier"), told.get("first_conv")
    modules = dict(model.named_modules())
    if not isinstance(head, str) or not isinstance(modules.get(head), nn.Linear):
        raise UserError(f"model.backbone: timm/{name} does not end in one linear head ({head}); choose another model")
    if not isinstance(first_conv, str) or not isinstance(modules.get(first_conv), nn.Conv2d):
        raise UserError(
            f"model.backbone: timm/{name} does not begin with one convolution ({first_conv}); choose another"
        )
    rest = tuple(_prefixes(model, {key for key in model.state_dict() if not has_prefix(key, [head])}))
    fixed = bool(told.get("fixed_input_size")) and _accepts_image_size(name, told["input_size"][-1])
    positions = model.state_dict().get("pos_embed")
    spec = BackboneSpec(
        name=f"timm/{name}",
        build=partial(_build, name),
        stages=(rest,),
        head=head,
        first_conv=first_conv,
        feature_dim=modules[head].in_features,  # type: ignore[arg-type]
        weights_urls=(told["url"],) if str(told.get("url", "")).startswith("http") else (),
        mean=tuple(told["mean"]),
        std=tuple(told["std"]),
        image_size_px=told["input_size"][-1],
        patch_px=_patch_px(modules[first_conv]) if fixed else None,
        position="pos_embed" if positions is not None and positions.ndim == 3 else None,
        hub=told.get("hf_hub_id"),
    )
    staged = replace(spec, stages=_stages(model, head))
    return staged if separable(model, staged) else spec


def _on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return _build(name)


def _build(name: str, image_size_px: int | None = None) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise UserError(
            f"model.backbone=timm/{name} needs timm, which is not installed: pip install 'medtl_dist[timm]'"
        ) from None
    base = name.partition(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3)
        meant = f"did you mean {', '.join(f'timm/{one}' for one in close)}?" if close else "see timm.list_models()"
        raise UserError(f"model.backbone: timm has no model '{name}'; {meant}")
    size: dict[str, Any] = {} if image_size_px is None else {"img_size": image_size_px}
    try:
        return timm.create_model(name, pretrained=False, num_classes=1000, **size)
    except RuntimeError as error:  # an unknown tag of weights, mostly
        raise UserError(f"model.backbone: timm/{name} can't be built: {str(error).partition(chr(10))[0]}") from None


def _accepts_image_size(name: str, image_size_px: int) -> bool:
    try:
        with torch.device("meta"):
            _build(name, image_size_px)
    except TypeError:
        return False
    return True


def _patch_px(first_conv: nn.Module) -> int:
    assert isinstance(first_conv, nn.Conv2d)
    return first_conv.stride[0]


def _stages(model: nn.Module, head: str) -> tuple[tuple[str, ...], ...]:
    """timm's coarse groups in order, without the head; a group of norms alone joins the stage before it."""
    from timm.models._manipulate import group_with_matcher  # timm.models has it for parameters only

    tensors = {name: tensor for name, tensor in model.state_dict().items() if not has_prefix(name, [head])}
    groups = group_with_matcher(iter(tensors.items()), model.group_matcher(coarse=True))  # type: ignore[operator]
    stages: list[set[str]] = []
    for number in sorted(groups):
        names = set(groups[number])
        if stages and all(tensors[name].ndim < 2 for name in names):
            stages[-1] |= names
        else:
            stages.append(names)
    return tuple(tuple(_prefixes(model, names)) for names in stages)


def _prefixes(model: nn.Module, names: set[str]) -> list[str]:
    """The fewest modules and single tensors that hold ``names`` and no other tensor, in the model's order."""
    mixed: set[str] = {""}  # modules that hold other tensors too
    every = list(model.state_dict())
    for name in every:
        if name not in names:
            parts = name.split(".")
            mixed.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    found: dict[str, None] = {}
    for name in every:
        if name in names:
            parts = name.split(".")
            whole = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
            found[next(path for path in whole if path not in mixed)] = None
    return list(found)
