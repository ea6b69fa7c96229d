"""batches → model, first step on the device: uint8 images become normalised floating-point tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per input channel (1 for grey, 3 for RGB) of images scaled to [0, 1].

    Raises:
        ValueError: no channel, unequal lengths, a value that is not finite, a standard deviation ≤ 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        # A config hands over lists; tuples keep the object hashable, which the cache of _scale_and_shift needs.
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} need one value per channel each")
        if not all(math.isfinite(value) for value in self.mean + self.std) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std}: values must be finite, std above 0")

    @property
    def channels(self) -> int:
        return len(self.mean)


def normalise(
    images: Tensor,
    normalisation: Normalisation,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """``(images / 255 - mean) / std``, computed in float32 (float64 when asked for) and rounded once to ``dtype``.

    Args:
        images: uint8 [batch, channels, height, width], on any device; left unchanged.
        normalisation: as many channels as the images.
        dtype: floating-point type of the result.
        channels_last: lay the result out as NHWC. One-channel images get true NHWC strides too: PyTorch calls both
            layouts of such a tensor "channels last" but runs NCHW when the strides are those of NCHW.

    Returns:
        ``dtype`` [batch, channels, height, width] on the device of ``images``.

    Raises:
        TypeError: images that are not uint8 (already normalised ones, for example).
        ValueError: another number of channels than the normalisation has.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"normalise takes uint8 images, not {images.dtype}")
    if images.ndim != 4 or images.shape[1] != normalisation.channels:
        expected = f"[batch, {normalisation.channels}, height, width]"
        raise ValueError(f"normalise got images of shape {list(images.shape)}, its normalisation needs {expected}")
    working = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = _scale_and_shift(normalisation, working, images.device)
    scaled = images.to(working, memory_format=torch.contiguous_format).mul_(scale).add_(shift)
    if not channels_last:
        return scaled.to(dtype)
    # Laid out last: on a CPU, scaling three interleaved channels takes several times as long as three planes.
    result = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    return result.copy_(scaled)


@lru_cache(maxsize=32)
def _scale_and_shift(normalisation: Normalisation, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Constants [1, channels, 1, 1] kept on the device: a copy to a GPU in every step would wait for it."""
    scale = [1 / (255 * std) for std in normalisation.std]
    shift = [-mean / std for mean, std in zip(normalisation.mean, normalisation.std, strict=True)]
    as_tensor = torch.tensor([scale, shift], dtype=dtype, device=device).view(2, 1, -1, 1, 1)
    return as_tensor[0], as_tensor[1]
