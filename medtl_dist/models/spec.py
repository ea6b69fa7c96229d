"""model, what is known of an architecture: one record, the same for torchvision's models and timm's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from medtl_dist.models.normalise import Normalisation

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneSpec:
    """What the rest of the project needs to know of an architecture. Names are those inside the model.

    A stage lists modules or single parameters; with the head, the stages hold every tensor of the model, each once.
    """

    name: str
    build: Callable[
        ..., nn.Module
    ]  # random weights, RGB input, the original head; image_size_px= where patch_px is set
    stages: tuple[tuple[str, ...], ...]  # from the input to the head
    head: str  # a nn.Linear
    first_conv: str
    feature_dim: int  # inputs of the head
    weights_urls: tuple[str, ...]  # ImageNet weights; the file name carries the start of its sha256; first = default
    zero_init: tuple[str, ...] = ()  # the last norm of each residual branch
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    image_size_px: int = 224
    patch_px: int | None = None  # the model is built for one input size, a multiple of this; None: any size will do
    position: str | None = None  # the learned positions [1, tokens, dim] that are interpolated to another input size
    left_out: tuple[str, ...] = ()  # modules of published weights that the model does without
    renames: tuple[tuple[str, str], ...] = ()  # (pattern, replacement): tensor names of older published files
    hub: str | None = None  # timm: repository of its published weights

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def build_for(self, image_size_px: int | None) -> nn.Module:
        """The architecture for an input of ``image_size_px`` (None: the native size)."""
        return self.build() if self.patch_px is None else self.build(image_size_px=image_size_px or self.image_size_px)


def native_normalisation(backbone: BackboneSpec, in_channels: int) -> Normalisation:
    """What the backbone's ImageNet weights were trained with; for grey (1 channel) the mean of means and of stds."""
    if in_channels == 3:
        return Normalisation(backbone.mean, backbone.std)
    if in_channels == 1:
        return Normalisation((sum(backbone.mean) / 3,), (sum(backbone.std) / 3,))
    raise ValueError(f"images have 1 (grey) or 3 (RGB) channels, not {in_channels}")


def has_prefix(tensor_name: str, prefixes: Iterable[str]) -> bool:
    """Whether the tensor or module ``tensor_name`` is one of ``prefixes`` or lies inside one."""
    return any(tensor_name == prefix or tensor_name.startswith(prefix + ".") for prefix in prefixes)
