"""two images ─► one number: are they the same picture? Registration of their pixels, then a comparison of fine detail.

Both are equalised at 128 px. The second is turned as the search says and registered by an affine map (ECC, coarse to
fine, started from the crop that the records agreed on). What is compared is detail of 2 to 10 px, divided by its local
strength: the outline of a chest is common to all patients, its vessels, ribs' edges and noise are not. The score is the
correlation of that detail where both images show something, from -1 to 1.

The threshold comes from the set: pairs of other groups, each image with the neighbour that most resembles it, are
scored in the same way. Fisher's z of strangers' scores is modelled as normal, the copies among the pairs left out
(``audit_null``); the threshold is where so many pairs as were compared give 0.01 false findings in all (candidates: one).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.audit_align import Floats
from medtl_dist.data.audit_null import fit_strangers
from medtl_dist.data.fingerprint import equalise, to_grey, turn

SIDE_PX = 128
# Fewer pairs than this say nothing about the tail: then only identical pixels are confirmed.
MIN_NULL_PAIRS = 40
FALSE_CONFIRMED = 0.01
FALSE_CANDIDATES = 1.0
# Whatever a set's own pairs say: below the first nothing is worth listing, below the second nothing is certain.
LEAST_CANDIDATE = 0.6
LEAST_CONFIRMED = 0.8
_MOST = 0.97
_LEAST_OVERLAP = 0.4


@dataclass(frozen=True)
class Threshold:
    """Scores from ``confirmed`` on are findings, from ``candidate`` on worth a look. ``confirmed`` is None when the
    set has too few pairs of other groups to tell. ``null_*`` describe their scores, without the ``suspected`` pairs that
    are copies more likely than not; ``compared`` counts the pairs registered, and ``expected_false`` is what the
    thresholds let through by chance, by the model, were all of those strangers."""

    confirmed: float | None
    candidate: float
    null_pairs: int
    null_median: float | None
    null_largest: float | None
    suspected: int
    compared: int
    expected_false: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def prepare(image: NDArray[np.uint8]) -> Floats:
    """uint8 ``[h, w, 1 or 3]`` to equalised float32 [128, 128]."""
    grey = to_grey(image)
    shrinking = min(grey.shape) >= SIDE_PX
    method = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
    return equalise(np.asarray(cv2.resize(grey, (SIDE_PX, SIDE_PX), interpolation=method), dtype=np.uint8))


def compare(first: Floats, second: Floats, variant: int, crop: Floats, inner: bool) -> float:
    """The score of two prepared images, to three decimals; see ``audit_search.Pairs`` for the rest."""
    whole, part = (first, turn(second, variant)) if inner else (turn(second, variant), first)
    return round(max(0.0, _detail_correlation(whole, part, _register(whole, part, crop))), 3)


def _register(whole: Floats, part: Floats, crop: Floats) -> Floats:
    """The affine map float32 [2, 3] from pixels of ``part`` to pixels of ``whole``; the crop's where ECC fails."""
    top, height, left, width = (float(value) for value in crop)
    start = np.array([[width, 0, left], [0, height, top]], np.float32)
    found = start
    for side, steps in ((SIDE_PX // 2, 15), (SIDE_PX, 8)):
        size = (side, side)
        fixed, moving = (
            cv2.GaussianBlur(cv2.resize(image, size, interpolation=cv2.INTER_AREA), (0, 0), 1.2)
            for image in (part, whole)
        )
        until = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, steps, 1e-4)
        try:
            _, matrix = cv2.findTransformECC(fixed, moving, _in_px(found, side), cv2.MOTION_AFFINE, until)
        except cv2.error:  # no convergence: nothing alike
            return _in_px(start, SIDE_PX)
        found = _in_shares(np.asarray(matrix, np.float32), side)
        if np.abs(found[:, :2] - np.eye(2)).max() > 0.4:
            return _in_px(start, SIDE_PX)
    return _in_px(found, SIDE_PX)


def _in_px(shares: Floats, side: int) -> Floats:
    """A map of positions as shares of the side to one of pixel centres."""
    matrix = shares.copy()
    matrix[:, 2] = side * shares[:, 2] + 0.5 * shares[:, :2].sum(axis=1) - 0.5
    return matrix


def _in_shares(matrix: Floats, side: int) -> Floats:
    shares = matrix.copy()
    shares[:, 2] = (matrix[:, 2] + 0.5 - 0.5 * matrix[:, :2].sum(axis=1)) / side
    return shares


def _detail_correlation(whole: Floats, part: Floats, matrix: Floats) -> float:
    size = (SIDE_PX, SIDE_PX)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(whole, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    covered = cv2.warpAffine(np.ones_like(whole), matrix, size, flags=flags) > 0.99
    # Detail near the edge of the overlap is made of what lies outside it.
    inside = cv2.erode(covered.astype(np.uint8), np.ones((9, 9), np.uint8), borderValue=0) > 0
    if inside.mean() < _LEAST_OVERLAP:
        return 0.0
    a, b = _detail(np.asarray(moved, np.float32))[inside], _detail(part)[inside]
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / math.sqrt(float((a * a).sum()) * float((b * b).sum()) + 1e-6))


def _detail(image: Floats) -> Floats:
    band = cv2.GaussianBlur(image, (0, 0), 1.0) - cv2.GaussianBlur(image, (0, 0), 4.0)
    strength = np.sqrt(cv2.GaussianBlur(band * band, (0, 0), 8.0))
    return np.asarray(band / (strength + 0.02), np.float32)


def fit_threshold(null_scores: NDArray[np.floating], compared: int, left_out: int = 0) -> Threshold:
    """The thresholds for ``compared`` pairs from the scores of pairs of other groups (see the module), of which
    ``left_out`` suspected ones were taken out before."""
    least = (LEAST_CONFIRMED, LEAST_CANDIDATE)
    if len(null_scores) < MIN_NULL_PAIRS:
        return Threshold(None, LEAST_CONFIRMED, len(null_scores), None, None, left_out, compared, {})
    strangers = fit_strangers(null_scores)
    of_strangers, suspected = null_scores[~strangers.suspected], left_out + int(strangers.suspected.sum())
    if len(of_strangers) < MIN_NULL_PAIRS:
        return Threshold(None, LEAST_CONFIRMED, len(of_strangers), None, None, suspected, compared, {})
    normal = statistics.NormalDist(strangers.mean, strangers.scale)
    values = []
    for expected, floor in zip((FALSE_CONFIRMED, FALSE_CANDIDATES), least, strict=True):
        quantile = normal.inv_cdf(1 - min(0.5, expected / max(1, compared)))
        values.append(round(min(_MOST, max(floor, math.tanh(quantile))), 3))
    names = ("confirmed", "candidates")
    tails = (compared * (1 - normal.cdf(math.atanh(value))) for value in values)
    false = {name: float(f"{tail:.2g}") for name, tail in zip(names, tails, strict=True)}
    median, largest = round(float(np.median(of_strangers)), 3), round(float(of_strangers.max()), 3)
    return Threshold(values[0], values[1], len(of_strangers), median, largest, suspected, compared, false)
