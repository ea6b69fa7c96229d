"""batches → model: a backbone with grey or RGB input, a new head, and the weights it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from medtl_dist.errors import UserError
from medtl_dist.models.grey import grey_conv
from medtl_dist.models.normalise import Normalisation
from medtl_dist.models.registry import BackboneSpec, names, native_normalisation, spec
from medtl_dist.models.weights import find_weights, load_weights
from medtl_dist.storage import StorageOptions

__all__ = ["BackboneSpec", "Created", "check_image_size", "create_model", "names", "native_normalisation", "spec"]

_HEAD_STREAM = 1 << 32  # the head's random numbers don't depend on how many the backbone drew


@dataclass(frozen=True)
class Created:
    """A new model and where it comes from."""

    model: nn.Module
    spec: BackboneSpec
    message: str  # one line for the user: weights, first convolution, head
    weights: str  # "random initial weights" | "ImageNet weights FILE" | "weights file FILE" | "checkpoint …"
    weights_sha256: str | None  # of the weights file's bytes


def create_model(
    backbone: str,
    *,
    num_outputs: int,
    in_channels: int,
    weights: str,
    normalisation: Normalisation,
    keep_head: bool = True,
    zero_init_residual: bool = False,
    image_size_px: int | None = None,
    seed: int,
    storage: StorageOptions | None = None,
) -> Created:
    """Build a classifier on the CPU in float32, in train mode, nothing frozen.

    The model is torchvision's (or timm's) plain module with its tensor names: images float [batch, in_channels, height, width]
    (normalised) → logits [batch, num_outputs]. With one channel its first convolution is a
    `medtl_dist.models.grey.GreyConv2d`, equal at the start to the RGB network on replicated grey: each channel
    normalised as the weights were when ``normalisation`` is the native one, else each by ``normalisation`` itself.

    Args:
        backbone: a name of `names`.
        num_outputs: outputs of the head, a new ``nn.Linear`` unless the weights file has one of that size.
        in_channels: 1 (grey) or 3 (RGB).
        weights: "imagenet", "random", or the path or address of a .pth or .safetensors file.
        normalisation: what the images will be normalised with, one value per input channel.
        keep_head: take the file's head where it has one of that size; False: a new one in any case.
        zero_init_residual: start the last norm of each residual branch at 0, so that each block starts as the identity
            (random weights only, and backbones that have such norms).
        image_size_px: side of the images, None for the backbone's own; a network with learned positions is built for it,
            and positions from a weights file are interpolated.
        seed: of the random initial values. The global random state is neither used nor changed.
        storage: how weights at an address are reached.

    Raises:
        UserError: unknown backbone; weights that are missing or don't fit; ``zero_init_residual`` with weights or without
            residual branches; an image size or grey input that the backbone can't take.
        ValueError: channels that don't match the normalisation.
    """
    chosen = spec(backbone)
    if in_channels != normalisation.channels:
        raise ValueError(f"normalisation has {normalisation.channels} channels, the images have {in_channels}")
    if zero_init_residual and weights != "random":
        raise UserError(
            f"model.zero_init_residual=true would erase part of the weights given by model.weights={weights}; "
            "it goes with model.weights=random, otherwise set it to false"
        )
    if zero_init_residual and not chosen.zero_init:
        raise UserError(f"model.zero_init_residual=true goes with the ResNets, not with {chosen.name}; set it to false")
    check_image_size(chosen, image_size_px or chosen.image_size_px)
    rgb, grey = _both_normalisations(chosen, normalisation)
    file = find_weights(weights, chosen, storage)
    model = _random_model(chosen, num_outputs, zero_init_residual, image_size_px, seed)
    if in_channels == 1:
        first_conv = model.get_submodule(chosen.first_conv)
        assert isinstance(first_conv, nn.Conv2d)
        try:
            model.set_submodule(chosen.first_conv, grey_conv(first_conv, rgb, grey))
        except ValueError as error:
            raise UserError(
                f"model.backbone: {chosen.name} can't take grey images ({error}); pack the set with --color rgb"
            ) from None
    if file is None:
        label, remarks = "random initial weights", [f"seed {seed}"]
        if zero_init_residual:
            remarks.append("residual branches start at zero")
    else:
        label, remarks = file.label, load_weights(model, chosen, file, rgb, grey, keep_head=keep_head)
    message = "; ".join([f"{chosen.name}: {label}", *remarks])
    return Created(model, chosen, message, label, None if file is None else file.sha256)


def check_image_size(chosen: BackboneSpec, image_size_px: int) -> None:
    """Whether the backbone takes images of this side: tried on a copy without data where it is not the native size.

    Raises:
        UserError: too small, or not a multiple of the patch.
    """
    if image_size_px == chosen.image_size_px or (image_size_px > chosen.image_size_px and chosen.patch_px is None):
        return
    multiple = f", a multiple of {chosen.patch_px}" if chosen.patch_px else ""
    refused = UserError(
        f"data.image_size_px={image_size_px} is nothing that {chosen.name} can take (too small, mostly); "
        f"its own size is {chosen.image_size_px}{multiple}"
    )
    if chosen.patch_px and image_size_px % chosen.patch_px:
        raise refused
    try:
        with torch.device("meta"), torch.no_grad():
            chosen.build_for(image_size_px).eval()(torch.zeros(2, 3, image_size_px, image_size_px))
    except (RuntimeError, ValueError, AssertionError):
        raise refused from None


def _random_model(
    chosen: BackboneSpec, num_outputs: int, zero_init_residual: bool, image_size_px: int | None, seed: int
) -> nn.Module:
    with _seeded(seed):
        model = chosen.build_for(image_size_px)
    with _seeded(seed + _HEAD_STREAM):
        model.set_submodule(chosen.head, nn.Linear(chosen.feature_dim, num_outputs), strict=True)
    if zero_init_residual:
        for name in chosen.zero_init:
            nn.init.zeros_(model.get_parameter(f"{name}.weight"))
    return model


def _both_normalisations(chosen: BackboneSpec, given: Normalisation) -> tuple[Normalisation, Normalisation]:
    """The (RGB, grey) pair between which a first convolution is turned, whichever of the two the images have."""
    if given.channels == 3:
        return given, Normalisation((sum(given.mean) / 3,), (sum(given.std) / 3,))
    if given == native_normalisation(chosen, 1):
        return native_normalisation(chosen, 3), given
    return Normalisation(given.mean * 3, given.std * 3), given


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` on the CPU; the caller's random state comes back afterwards, GPUs' states are not touched."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
