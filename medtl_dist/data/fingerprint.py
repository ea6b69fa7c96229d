"""decoded image ─► a record of fixed size: what the audit remembers of each image, 185 bytes whatever its pixels.

- ``pixels``: a hash of shape and pixels, for exact copies.
- ``coefs``: the 135 lowest DCT coefficients of the 64 px, *equalised* grey image, 8 bits each. Equalising replaces a grey
  level by its rank, so no monotone change of intensity (window, gamma, contrast) shows, and the negative of an image
  has exactly the negated coefficients. Flips negate the odd ones, a transposition transposes them: the sixteen
  ``Variant`` of an image follow from its record, without its pixels.
- ``stats``: brightness here and there, for outliers and shortcuts.

Coefficients instead of their signs (a "perceptual hash" of bits): chest X-rays look alike, and what tells them apart is
where they differ from the set's mean, which is known only after all were seen.
"""

from __future__ import annotations

import hashlib

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE_PX = 64
NUM_FREQUENCIES = 16
# Coefficients (vertical, horizontal frequency) with u + v ≤ 15, without the mean.
_KEPT = np.add.outer(np.arange(NUM_FREQUENCIES), np.arange(NUM_FREQUENCIES)) < NUM_FREQUENCIES
_KEPT[0, 0] = False
ROWS, COLUMNS = np.nonzero(_KEPT)
NUM_COEFS = len(ROWS)
STATS = (
    "mean", "std", "dark", "bright", "ring", "left", "right", "top", "bottom",
    "top_left", "top_right", "bottom_left", "bottom_right", "centre", "grey",
)  # fmt: skip

RECORD = np.dtype(
    [("pixels", np.uint64, 2), ("coefs", np.int8, NUM_COEFS), ("stats", np.uint8, len(STATS)), ("size", np.uint16, 2)]
)

_FULL = SIDE_PX / 2  # the largest coefficient an equalised image (-1/2 … 1/2) can have
# The value of a stored coefficient, by its byte.
_SHARES = np.arange(256, dtype=np.uint8).view(np.int8) / 127
_LEVELS: NDArray[np.float32] = (np.sign(_SHARES) * _SHARES**2 * _FULL).astype(np.float32)
# Below this standard deviation of the 64 px image there is nothing to compare.
_BLANK_STD = 2

# A variant is a number of four bits.
FLIP_X, FLIP_Y, TRANSPOSE, NEGATIVE = 1, 2, 4, 8
NUM_VARIANTS = 16
_TURNED = (
    "", "flipped left-right", "flipped upside down", "rotated by 180°",
    "transposed", "rotated by 90°", "rotated by 270°", "transposed and rotated by 180°",
)  # fmt: skip


def variant_name(variant: int) -> str:
    """``as it is``, ``flipped left-right``, ``negative, rotated by 180°`` …"""
    parts = ["negative"] if variant & NEGATIVE else []
    turned = _TURNED[variant & 7]
    return ", ".join([*parts, turned] if turned else parts) or "as it is"


def to_grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 ``[h, w, 1 or 3]`` to ``[h, w]`` (ITU-R 601 luma)."""
    return image[..., 0] if image.shape[2] == 1 else np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def equalise(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Every pixel's mid-rank among the pixels, from -1/2 to 1/2. The negative's is exactly minus this."""
    counts = np.bincount(grey.ravel(), minlength=256)
    rank = (np.cumsum(counts) - counts / 2) / grey.size - 0.5
    return rank.astype(np.float32)[grey]


def fingerprint(image: NDArray[np.uint8]) -> NDArray[np.void]:
    """The record (dtype ``RECORD``, shape []) of uint8 ``[h, w, 1 or 3]``."""
    record = np.zeros((), RECORD)
    height, width = image.shape[:2]
    shape = np.array(image.shape, "<u4").tobytes()
    digest = hashlib.blake2b(shape + np.ascontiguousarray(image).tobytes(), digest_size=16).digest()
    record["pixels"] = np.frombuffer(digest, "<u8")
    record["size"] = min(width, 65535), min(height, 65535)
    small = np.asarray(cv2.resize(to_grey(image), (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    record["coefs"] = pack_coefs(np.asarray(cv2.dct(equalise(small)), np.float32)[ROWS, COLUMNS])
    record["stats"] = _stats(small, image)
    return record


def _stats(small: NDArray[np.uint8], image: NDArray[np.uint8]) -> list[int]:
    left, right, top, bottom = small[:, :4], small[:, -4:], small[:4], small[-4:]
    corners = [small[:8, :8], small[:8, -8:], small[-8:, :8], small[-8:, -8:]]
    ring = (float(small.sum()) - float(small[2:-2, 2:-2].sum())) / (SIDE_PX**2 - (SIDE_PX - 4) ** 2)
    parts = [left, right, top, bottom, *corners, small[16:48, 16:48]]
    below = np.cumsum(np.bincount(small.ravel(), minlength=256))
    dark, bright = np.searchsorted(below, (0.02 * small.size, 0.98 * small.size))
    mean, std = cv2.meanStdDev(small)
    spread = np.ptp(image, axis=2).max() if image.shape[2] == 3 else 0
    values = [mean[0, 0], std[0, 0], dark, bright, ring, *(cv2.mean(part)[0] for part in parts)]
    return [round(float(value)) for value in values] + [int(spread <= 3)]


def pack_coefs(coefs: NDArray[np.floating]) -> NDArray[np.int8]:
    """Coefficients ``[..., 135]`` in 8 bits each, finer near 0."""
    root = np.sqrt(np.minimum(np.abs(coefs) / _FULL, 1))
    return np.rint(127 * np.sign(coefs) * root).astype(np.int8)


def coefficients(records: NDArray[np.void]) -> NDArray[np.float32]:
    """float32 ``[n, 135]`` of the records ``[n]``."""
    return _LEVELS[records["coefs"].view(np.uint8)]


def is_blank(records: NDArray[np.void]) -> NDArray[np.bool_]:
    """Images without structure: they match anything and nothing."""
    return stat(records, "std") < _BLANK_STD


def stat(records: NDArray[np.void], name: str) -> NDArray[np.float64]:
    """One of ``STATS`` as float64 ``[n]``."""
    return records["stats"][:, STATS.index(name)].astype(np.float64)


def variant_operator(variant: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """``(order, sign)``: the coefficients of the variant are ``coefs[:, order] * sign``."""
    order = np.arange(NUM_COEFS)
    if variant & TRANSPOSE:
        place = {(u, v): i for i, (u, v) in enumerate(zip(ROWS.tolist(), COLUMNS.tolist(), strict=True))}
        order = np.array([place[v, u] for u, v in zip(ROWS.tolist(), COLUMNS.tolist(), strict=True)])
    sign = np.ones(NUM_COEFS, np.float32)
    if variant & FLIP_X:
        sign = sign * np.where(COLUMNS % 2, -1, 1)
    if variant & FLIP_Y:
        sign = sign * np.where(ROWS % 2, -1, 1)
    return order, (-sign if variant & NEGATIVE else sign).astype(np.float32)


def turn(image: NDArray[np.floating], variant: int) -> NDArray[np.floating]:
    """The variant of an equalised image ``[h, w]``: transposed, then flipped, then negated."""
    if variant & TRANSPOSE:
        image = image.T
    if variant & FLIP_X:
        image = image[:, ::-1]
    if variant & FLIP_Y:
        image = image[::-1]
    return np.ascontiguousarray(-image if variant & NEGATIVE else image)
