"""stored values of one grey DICOM frame ─► uint8 pixels: padding, modality, window, polarity, in float, in this order.

Pure arithmetic, without pydicom: the tags are read by ``dicom_tags``.

    padding masked → modality LUT or rescale → VOI LUT, window function, percentile or fixed range → inverted → uint8

Every step is a function of the stored value alone (PS3.3 C.7.5.1.1.2, C.11.1, C.11.2.1, C.11.6), so it is computed once
per value that occurs and looked up for each pixel. Percentiles are of the image's unpadded pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medtl_dist.errors import UserError

Floats = NDArray[np.float64]
FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
FRAMES = ("single", "first", "middle", "all")
PERCENTILES = (0.5, 99.5)
_BLOCK_PX = 2**20


@dataclass(frozen=True)
class Rendering:
    """How a set's DICOM frames become pixels. ``policy``: ``tags`` (the file's first VOI LUT or window, percentiles where
    it has none), ``percentile`` or ``fixed``; ``low``, ``high``: percentiles, or the fixed range in the modality's
    units; ``frames``: of a file of several frames none, the first, the middle one or all."""

    policy: str = "percentile"
    low: float = PERCENTILES[0]
    high: float = PERCENTILES[1]
    frames: str = "single"

    def __post_init__(self) -> None:
        if self.frames not in FRAMES:
            raise UserError(f"--frames {self.frames}: one of {', '.join(FRAMES)} expected")

    def as_json(self) -> dict[str, Any]:
        """For ``preprocessing.window`` of ``dataset.json``."""
        if self.policy == "fixed":
            return {"policy": "fixed", "low": self.low, "high": self.high, "frames": self.frames}
        return {"policy": self.policy, "percentiles": [self.low, self.high], "frames": self.frames}


def rendering_from(window: Mapping[str, Any]) -> Rendering:
    """The ``Rendering`` that ``as_json`` wrote."""
    low, high = window.get("percentiles") or (window["low"], window["high"])
    return Rendering(window["policy"], float(low), float(high), window["frames"])


def parse_window(text: str, frames: str = "single") -> Rendering:
    """``tags``, ``percentile`` or ``LO,HI``. Raises: UserError, anything else."""
    if text in ("tags", "percentile"):
        return Rendering(text, frames=frames)
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--window {text}: tags, percentile, or LO,HI with LO below HI expected, as -1000,400")
    return Rendering("fixed", low, high, frames)


def chosen_frames(frames: str, count: int) -> list[int]:
    """The frames of a file that become images, -1 for a file of one; none of several under ``single``."""
    if count == 1:
        return [-1]
    return {"single": [], "first": [0], "middle": [count // 2], "all": list(range(count))}[frames]


class Rescale(NamedTuple):
    """``slope * stored + intercept``."""

    slope: float
    intercept: float


@dataclass(frozen=True)
class Lut:
    """A lookup table: ``entries[0]`` for values up to ``first``, the last entry for all beyond the end. ``full``: the
    largest value that its bits can hold."""

    first: int
    entries: Floats
    full: float

    def __call__(self, values: Floats) -> Floats:
        return self.entries[np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1).astype(np.int64)]


class Window(NamedTuple):
    """A window centre and width, and the function of PS3.3 C.11.2.1 that applies them."""

    function: str
    center: float
    width: float

    def __call__(self, values: Floats) -> Floats:
        """To 0 … 1."""
        if self.function == "SIGMOID":
            # Beyond ±700 the exponential overflows, and the result is 0 or 1 long before.
            return 1 / (1 + np.exp(np.clip(-4 * (values - self.center) / self.width, -700, 700)))
        if self.function == "LINEAR_EXACT":
            return np.clip((values - self.center) / self.width + 0.5, 0, 1)
        if self.width == 1:  # the ramp has no length: a step
            return (values > self.center - 0.5).astype(np.float64)
        return np.clip((values - (self.center - 0.5)) / (self.width - 1) + 0.5, 0, 1)


class Range(NamedTuple):
    """``low`` becomes black and ``high`` white."""

    low: float
    high: float

    def __call__(self, values: Floats) -> Floats:
        """To 0 … 1; all 0 where ``low`` is ``high`` (an image of one value)."""
        if self.high <= self.low:
            return np.zeros_like(values)
        return np.clip((values - self.low) / (self.high - self.low), 0, 1)


class Percentiles(NamedTuple):
    """The range between two percentiles of the image's own unpadded pixels."""

    low: float
    high: float


@dataclass(frozen=True)
class Grey:
    """What turns stored values into pixels. ``padding``: first and last padding value, both padding; ``invert``: the
    smallest value is to be shown white."""

    padding: tuple[int, int] | None
    modality: Rescale | Lut
    window: Window | Lut | Range | Percentiles
    invert: bool


def render(stored: NDArray[np.integer], grey: Grey) -> NDArray[np.uint8]:
    """Integers [height, width] of at most 16 bits to uint8 [height, width]; padding ends as 0."""
    lowest, height = int(stored.min()), stored.shape[0]
    counts = np.zeros(int(stored.max()) - lowest + 1, dtype=np.int64)
    step = max(1, _BLOCK_PX // max(1, stored.shape[1]))  # 64-bit places of a whole image of 100 Mpx would be 800 MB
    blocks = [slice(start, start + step) for start in range(0, height, step)]
    for rows in blocks:
        counts += np.bincount(_places(stored[rows], lowest).reshape(-1), minlength=len(counts))
    candidates = np.arange(lowest, lowest + len(counts), dtype=np.int64)
    padded = np.zeros(len(counts), dtype=bool)
    if grey.padding is not None:
        padded = (candidates >= min(grey.padding)) & (candidates <= max(grey.padding))
    values = modality_values(candidates.astype(np.float64), grey.modality)
    shown = _windowed(values, np.where(padded, 0, counts), grey.window)
    if grey.invert:
        shown = 1 - shown
    table = np.floor(np.where(padded, 0, shown) * 255 + 0.5).astype(np.uint8)
    pixels = np.empty(stored.shape, dtype=np.uint8)
    for rows in blocks:
        np.take(table, _places(stored[rows], lowest), out=pixels[rows])
    return pixels


def _places(stored: NDArray[np.integer], lowest: int) -> NDArray[np.intp]:
    return np.subtract(stored, lowest, dtype=np.intp)


def modality_values(stored: Floats, modality: Rescale | Lut) -> Floats:
    """Stored values to the modality's (Hounsfield units, optical density …)."""
    return modality(stored) if isinstance(modality, Lut) else stored * modality.slope + modality.intercept


def _windowed(values: Floats, counts: NDArray[np.int64], window: Window | Lut | Range | Percentiles) -> Floats:
    if isinstance(window, Percentiles):
        window = percentile_range(values, counts, window)
    if isinstance(window, Lut):
        return np.clip(window(values) / window.full, 0, 1)
    return window(values)


def percentile_range(values: Floats, counts: NDArray[np.int64], percentiles: Percentiles) -> Range:
    """The percentiles of ``values[i]`` repeated ``counts[i]`` times, linear between neighbours; (0, 0) of nothing."""
    order = np.argsort(values, kind="stable")
    last = np.cumsum(counts[order])  # how many pixels are at or below each value
    total = int(last[-1])
    if total == 0:
        return Range(0.0, 0.0)
    found = []
    for percentile in percentiles:
        position = (total - 1) * percentile / 100
        below = int(position)
        ends = [values[order[np.searchsorted(last, min(n, total - 1), side="right")]] for n in (below, below + 1)]
        found.append(float(ends[0] + (ends[1] - ends[0]) * (position - below)))
    return Range(*found)
