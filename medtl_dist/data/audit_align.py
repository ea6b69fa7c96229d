"""fingerprints ─► how well two images agree once one is cropped to the other, from their records alone.

Cropping and stretching along an axis is linear in the DCT coefficients: ``C' = R(y) C R(x)ᵀ`` with 16 × 16 matrices.
A few Gauss-Newton steps over the four numbers (start and extent of the crop along y and x) align a pair in tens of
microseconds, and no image is decoded for it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.fingerprint import COLUMNS, NUM_FREQUENCIES, ROWS

Floats = NDArray[np.floating[Any]]

_POINTS = (np.arange(32, dtype=np.float64) + 0.5) / 32  # enough for frequencies below 16
_STARTS = np.round(np.arange(-20, 21) * 0.01, 2)  # start and extent of a crop, as shares of the side
_EXTENTS = np.round(np.arange(76, 131) * 0.01, 2)
_CHUNK = 2048
_FLAT = ROWS * NUM_FREQUENCIES + COLUMNS
_STEPS = 3
# Agreement after one step below which more steps never reached what is worth registering.
_WORTH_MORE = 0.5


class Alignment(NamedTuple):
    """``score`` float32 [pairs]: correlation of what differs from the set's look, after cropping; ``crop`` float32
    [pairs, 4]: start and extent along y, then x, of the second image within the first (``inner`` True), or of the
    first within the second."""

    score: Floats
    crop: Floats
    inner: NDArray[np.bool_]


def _cosines(points: Floats) -> NDArray[np.float64]:
    """Orthonormal cosines at positions in [0, 1], float64 [..., 16]."""
    frequency = np.arange(NUM_FREQUENCIES)
    scale = np.where(frequency == 0, 1.0, np.sqrt(2.0)) / np.sqrt(len(_POINTS))
    return np.cos(np.pi * points[..., None] * frequency) * scale


def crop_matrices(starts: Floats, extents: Floats) -> NDArray[np.float64]:
    """R [..., 16, 16]: the coefficients along one axis of the part [start, start + extent] of an image, stretched to
    its full side."""
    return _cosines(_POINTS).T @ _cosines(starts[..., None] + extents[..., None] * _POINTS)


@functools.lru_cache(maxsize=1)
def _tables() -> tuple[Floats, Floats, Floats]:
    """R at every start and extent [starts, extents, 16, 16]; derivatives of R at no crop by start and by extent."""
    table = crop_matrices(_STARTS[:, None], _EXTENTS[None, :])
    frequency = np.arange(NUM_FREQUENCIES)
    scale = np.sqrt(2.0 / len(_POINTS))
    slope = -np.sin(np.pi * np.outer(_POINTS, frequency)) * np.pi * frequency * scale
    base = _cosines(_POINTS).T
    return table.astype(np.float32), (base @ slope).astype(np.float32), (base @ (slope * _POINTS[:, None])).astype("f4")


def unpack(coefs: Floats) -> Floats:
    """float32 [n, 135] to matrices [n, 16, 16], the unknown coefficients 0."""
    matrices = np.zeros((len(coefs), NUM_FREQUENCIES, NUM_FREQUENCIES), np.float32)
    matrices[:, ROWS, COLUMNS] = coefs
    return matrices


def align(first: Floats, second: Floats, look: Floats, scale: Floats) -> Alignment:
    """Align pairs, float32 [pairs, 135] each: crops the first to the second and the second to the first, and keeps the
    better. Pairs that one step leaves far apart get no more. ``look``, ``scale``: see
    ``audit_search.Projection``."""
    found = Alignment(np.zeros(len(first), "f4"), np.zeros((len(first), 4), "f4"), np.ones(len(first), bool))
    for start in range(0, len(first), _CHUNK):
        some = slice(start, start + _CHUNK)
        a, b = first[some], second[some]
        score, crop = _crop_to(a, b, look, scale, 1)
        inner = np.ones(len(a), bool)
        near = np.flatnonzero(score >= _WORTH_MORE)
        if len(near):
            forth = _crop_to(a[near], b[near], look, scale, _STEPS)
            back = _crop_to(b[near], a[near], look, scale, _STEPS)
            inner[near] = forth[0] >= back[0]
            score[near] = np.where(inner[near], forth[0], back[0])
            crop[near] = np.where(inner[near, None], forth[1], back[1])
        found.score[some], found.crop[some], found.inner[some] = score, crop, inner
    return found


def _crop_to(whole: Floats, part: Floats, look: Floats, scale: Floats, steps: int) -> tuple[Floats, Floats]:
    table, by_start, by_extent = _tables()
    matrices = unpack(whole)
    crop = np.tile(np.array([0, 1, 0, 1], np.float32), (len(whole), 1))
    aim = part / scale
    target = aim - (aim @ look) @ look.T
    length = np.linalg.norm(target, axis=1)
    best = np.full(len(whole), -1, np.float32)
    kept = crop.copy()
    for step in range(steps + 1):
        places = np.rint((crop - [_STARTS[0], _EXTENTS[0], _STARTS[0], _EXTENTS[0]]) / 0.01).astype(int)
        seen = table[places[:, 0], places[:, 1]] @ matrices @ table[places[:, 2], places[:, 3]].transpose(0, 2, 1)
        shown = _kept(seen) / scale
        value = shown - (shown @ look) @ look.T
        score = np.einsum("ps,ps->p", value, target) / np.maximum(np.linalg.norm(value, axis=1) * length, 1e-6)
        better = score > best
        best[better], kept[better] = score[better], crop[better]
        if step < steps:
            crop = _stepped(crop, seen, aim - shown, (by_start, by_extent), scale)
    return best, kept


def _kept(matrices: Floats) -> Floats:
    """Matrices [..., 16, 16] to their kept coefficients [..., 135]."""
    return matrices.reshape(*matrices.shape[:-2], NUM_FREQUENCIES**2).take(_FLAT, axis=-1)


def _stepped(crop: Floats, seen: Floats, missing: Floats, by: tuple[Floats, Floats], scale: Floats) -> Floats:
    """One damped Gauss-Newton step of the crop, within the tables."""
    slopes = np.stack([by[0] @ seen, by[1] @ seen, seen @ by[0].T, seen @ by[1].T], axis=1)
    slopes = _kept(slopes) / scale
    normal = slopes @ slopes.transpose(0, 2, 1)
    damping = np.einsum("pii->p", normal) * 0.0025 + 1e-6
    normal += damping[:, None, None] * np.eye(4, dtype=np.float32)
    gain = slopes @ missing[..., None]
    move = np.clip(np.linalg.solve(normal, gain)[..., 0], -0.1, 0.1)
    stepped = np.empty_like(crop)
    for axis in (0, 2):  # the step is in the frame of the crop so far
        stepped[:, axis] = crop[:, axis] + crop[:, axis + 1] * move[:, axis]
        stepped[:, axis + 1] = crop[:, axis + 1] * (1 + move[:, axis + 1])
    low, high = (_STARTS[0], _EXTENTS[0]), (_STARTS[-1], _EXTENTS[-1])
    return np.clip(stepped, np.array(low * 2, np.float32), np.array(high * 2, np.float32))
