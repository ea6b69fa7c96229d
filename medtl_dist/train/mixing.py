"""batches → batches: mixup and cutmix, on the device, the same at every world size and after every resume.

An image is mixed with the image that its lane showed one step before (data/plan.py: lanes don't depend on the world size, and
their order is random), by draws seeded with (seed, epoch, key). So what a sample is mixed with, and how, is a function of
the plan alone. In an epoch's first step nothing came before, and images stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from medtl_dist.data.stream import Batch
from medtl_dist.data.transforms import MIXING, draws_of
from medtl_dist.sections import Augment

_WHOLE = 2**16  # shares are whole parts of it, so that mixing is integer arithmetic, exact on every device


def on(config: Augment) -> bool:
    """Whether images are mixed at all."""
    return config.mixup_alpha > 0 or config.cutmix_alpha > 0


def mixed(
    batches: Iterator[Batch],
    config: Augment,
    *,
    num_classes: int,
    seed: int,
    epoch: int,
    start_step: int,
    device: torch.device,
) -> Iterator[Batch]:
    """The batches with images on the device and labels as shares, float32 [rows, classes].

    ``batches`` begin one step before ``start_step`` where that is above 0; that first one is only mixed in, not returned.
    """
    before: tuple[Tensor, Tensor] | None = None
    for number, batch in enumerate(batches, start=max(start_step - 1, 0)):
        images = batch.images.to(device, non_blocking=True)
        shares = F.one_hot(batch.labels, num_classes).float()
        if number >= start_step:
            if before is None:
                result = images, shares
            else:
                draws = np.stack([draws_of(seed, epoch, bytes.fromhex(key), MIXING) for key in batch.keys])
                result = mix(images, shares, *before, config, draws)
            yield dataclasses.replace(batch, images=result[0], labels=result[1])
        before = images, shares


def mix(
    images: Tensor, shares: Tensor, other_images: Tensor, other_shares: Tensor, config: Augment, draws: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Each image mixed with the other of its row: mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019), drawn evenly where
    both are on. The kept share is Beta(α, α); in cutmix it is that of the box that is really pasted.

    Args:
        images, other_images: uint8 [rows, C, S, S] on one device; left unchanged.
        shares, other_shares: float32 [rows, classes] on the CPU.
        draws: float64 [rows, ≥ 4] in [0, 1): which, how much, and the centre of the box.
    """
    height, width = images.shape[2:]
    cut = draws[:, 0] < (0.5 if config.mixup_alpha > 0 and config.cutmix_alpha > 0 else float(config.cutmix_alpha > 0))
    alpha = np.where(cut, config.cutmix_alpha, config.mixup_alpha)
    kept = betaincinv(alpha, alpha, draws[:, 1])
    boxes = _boxes(np.sqrt(1 - kept), draws[:, 2], draws[:, 3], height, width)
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / (height * width)
    parts = np.round(np.where(cut, 1 - area, kept) * _WHOLE).astype(np.int32)
    share = torch.from_numpy((parts / _WHOLE).astype(np.float32))[:, None]
    # Of each pixel: the same parts everywhere (mixup), or all of one image (cutmix).
    inside = _inside(torch.from_numpy(boxes).to(images.device, non_blocking=True), height, width)
    is_cut, parts_there = (torch.from_numpy(a).to(images.device)[:, None, None, None] for a in (cut, parts))
    weight = torch.where(is_cut, torch.where(inside, 0, _WHOLE), parts_there)
    blended = (images.int() * weight + other_images.int() * (_WHOLE - weight) + _WHOLE // 2) >> 16
    return blended.to(torch.uint8), shares * share + other_shares * (1 - share)


def _boxes(side: np.ndarray, x: np.ndarray, y: np.ndarray, height: int, width: int) -> np.ndarray:
    """int64 [rows, 4] top, bottom, left, right: sides of ``side`` of the image's, centred at a random pixel, cut at the edge."""
    found: list[np.ndarray] = []
    for centre, length in ((y, height), (x, width)):
        middle, half = np.floor(centre * length), np.floor(side * length) / 2
        found += [np.clip(np.floor(middle - half), 0, length), np.clip(np.floor(middle + half), 0, length)]
    return np.stack(found, axis=1).astype(np.int64)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """bool [rows, 1, height, width] on the boxes' device."""
    rows = torch.arange(height, device=boxes.device)[None, None, :, None]
    columns = torch.arange(width, device=boxes.device)[None, None, None, :]
    top, bottom, left, right = (boxes[:, side, None, None, None] for side in range(4))
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
