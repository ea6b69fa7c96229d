"""A model with what surrounds it, as every part of training passes it on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from medtl_dist.models.normalise import Normalisation
from medtl_dist.models.registry import BackboneSpec
from medtl_dist.train.precision import Precision


@dataclass(frozen=True)
class Network:
    """A model on its device, frozen as asked, with what surrounds it; ``message`` and ``weights`` say where they are from."""

    model: nn.Module
    spec: BackboneSpec
    frozen_depth: int
    normalisation: Normalisation
    image_size_px: int
    precision: Precision
    message: str
    weights: str
    weights_sha256: str | None
