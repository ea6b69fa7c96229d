"""images → boundary → logits: frozen layers computed apart from what learns, so that their outputs can be kept.

What a convolution gives for an image depends, in the last bits, on how many images it is given at once, but not on which
ones, nor on the image's place among them (measured: tests/numerics/test_cached_training.py). So wherever the outputs might
be kept they are computed for ``rows`` images at a time, filled up with black ones, kept or not: the numbers are the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from medtl_dist.config import Config
from medtl_dist.errors import UserError
from medtl_dist.models.freezing import resolve_depth
from medtl_dist.models.normalise import Normalisation, normalise
from medtl_dist.models.registry import BackboneSpec, has_prefix
from medtl_dist.models.split import Split, split
from medtl_dist.train import mixing
from medtl_dist.train.network import Network
from medtl_dist.train.precision import Precision

ROWS = {
    "cpu": 8,
    "cuda": 32,
}  # a GPU is idle with 8 images, a CPU is not, and parts of a batch that are filled up cost less


@dataclass(frozen=True)
class Prefix:
    """The first ``depth`` stages of a network, which never learn, apart from the rest. A boundary of an image has ``shape``
    and ``dtype``; ``laid_out`` is how a batch of them lies in memory."""

    depth: int
    split: Split
    rows: int
    normalisation: Normalisation
    precision: Precision
    device: torch.device
    channels_last: bool
    image_size_px: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def laid_out(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last and len(self.shape) == 3 else torch.contiguous_format

    def blank(self, num_rows: int) -> Tensor:
        """Zeros in the place of a batch of boundaries."""
        size = (num_rows, *self.shape)
        return torch.empty(size, dtype=self.dtype, device=self.device, memory_format=self.laid_out).zero_()

    def to_rows(self, boundaries: Tensor) -> Tensor:
        """A batch of boundaries as it lies in memory, an image a row: uint8 [batch, bytes], on the CPU."""
        last = boundaries.permute(0, 2, 3, 1) if self.laid_out is torch.channels_last else boundaries
        return last.reshape(len(boundaries), -1).contiguous().cpu().view(torch.uint8)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The reverse of `to_rows`, in place: a view of ``rows``, on their device."""
        flat = rows.view(self.dtype)
        if self.laid_out is torch.channels_last:
            channels, height, width = self.shape
            return flat.view(len(rows), height, width, channels).permute(0, 3, 1, 2)
        return flat.view(len(rows), *self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's boundary."""
        return math.prod(self.shape) * self.dtype.itemsize


class FromBoundary(nn.Module):
    """The network from the boundary on, as a module that DDP can wrap: boundary → logits."""

    def __init__(self, model: nn.Module, suffix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._suffix = suffix

    def forward(self, boundary: Tensor) -> Tensor:
        return self._suffix(boundary)


def boundary_depth(config: Config, spec: BackboneSpec) -> int:
    """Stages that are frozen in every epoch."""
    return min([resolve_depth(spec, config.model.frozen_depth), *config.train.unfreeze.values()])


def rows_on(device: torch.device) -> int:
    """How many images the frozen layers are given at a time."""
    return ROWS.get(device.type, 8)


def why_whole(config: Config, spec: BackboneSpec) -> str | None:
    """Why the network is computed as a whole, as far as the config tells; None: its frozen layers can be computed apart."""
    if config.augment.views is None:
        return "augment.views is null: every epoch has views of its own"
    if mixing.on(config.augment):
        return "mixup and cutmix make every image new"
    if boundary_depth(config, spec) == 0:
        return "no stage is frozen in every epoch"
    return None


def prefix_of(config: Config, network: Network) -> tuple[Prefix | None, str]:
    """The network's frozen layers computed apart, or None and why not. Depends on the config alone, never on what is kept."""
    model, spec, normalisation, precision = network.model, network.spec, network.normalisation, network.precision
    image_size_px = network.image_size_px
    reason = why_whole(config, spec)
    if reason is not None:
        return None, reason
    depth = boundary_depth(config, spec)
    try:
        parts = split(model, spec, depth)
    except UserError as error:
        return None, error.message
    device = next(model.parameters()).device
    images = torch.zeros((1, normalisation.channels, image_size_px, image_size_px), dtype=torch.uint8, device=device)
    with precision.autocast():
        first = parts.prefix(normalise(images, normalisation, channels_last=config.train.channels_last))
    return Prefix(
        depth=depth,
        split=parts,
        rows=rows_on(device),
        normalisation=normalisation,
        precision=precision,
        device=device,
        channels_last=config.train.channels_last,
        image_size_px=image_size_px,
        shape=tuple(first.shape[1:]),
        dtype=first.dtype,
    ), ""


def boundary_of(prefix: Prefix, images: Tensor) -> Tensor:
    """What the frozen layers make of images, uint8 [batch, channels, height, width] on their device: [batch, *shape]."""

    def first(part: Tensor) -> Tensor:
        return prefix.split.prefix(normalise(part, prefix.normalisation, channels_last=prefix.channels_last))

    return in_rows(prefix, first, images, lambda num_rows: images.new_zeros((num_rows, *images.shape[1:])))


@torch.no_grad()
def in_rows(
    prefix: Prefix, function: Callable[[Tensor], Tensor], inputs: Tensor, blank: Callable[[int], Tensor]
) -> Tensor:
    """``function`` of ``prefix.rows`` inputs at a time, as boundaries [batch, *shape]; the last ones in a ``blank``."""
    result = prefix.blank(len(inputs))
    for start in range(0, len(inputs), prefix.rows):
        part = inputs[start : start + prefix.rows]
        if len(part) < prefix.rows:
            whole = blank(prefix.rows)
            whole[: len(part)] = part
            part = whole
        with prefix.precision.autocast():
            made = function(part)
        result[start : start + prefix.rows] = made[: len(inputs) - start]
    return result


def weights_digests(model: nn.Module, spec: BackboneSpec, depth: int) -> list[str]:
    """sha256 of the tensors of the first 1, 2, … ``depth`` stages, names and types included."""
    digest = hashlib.sha256()
    found: list[str] = []
    state = cast(dict[str, Any], model.state_dict())
    for stage in spec.stages[:depth]:
        for name in sorted(name for name in state if has_prefix(name, stage)):
            tensor = state[name].detach().cpu().contiguous()
            if name.endswith("num_batches_tracked"):
                continue  # of no effect where nothing learns
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        found.append(digest.hexdigest())
    return found
