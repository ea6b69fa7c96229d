"""model, what there is to choose from: torchvision's table by name, and ``timm/NAME`` for every model of timm."""

from __future__ import annotations

import difflib

from medtl_dist.errors import UserError
from medtl_dist.models.families import torchvision_backbones
from medtl_dist.models.spec import BackboneSpec, has_prefix, native_normalisation

__all__ = ["TIMM", "BackboneSpec", "has_prefix", "names", "native_normalisation", "spec"]

TIMM = "timm/"


def spec(name: str) -> BackboneSpec:
    """The backbone called ``name``.

    Raises:
        UserError: an unknown name (the message lists the valid ones), or a timm model that does not fit in.
    """
    if name.startswith(TIMM):
        from medtl_dist.models.timm_models import timm_spec

        return timm_spec(name.removeprefix(TIMM))
    if name not in _BACKBONES:
        close = difflib.get_close_matches(name, names(), n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(
            f"model.backbone: unknown backbone '{name}'{meant}; choose one of: {', '.join(names())}, or timm/NAME"
        )
    return _BACKBONES[name]


def names() -> list[str]:
    """All backbones but timm's, in the order of the table."""
    return list(_BACKBONES)


_BACKBONES: dict[str, BackboneSpec] = {backbone.name: backbone for backbone in torchvision_backbones()}
