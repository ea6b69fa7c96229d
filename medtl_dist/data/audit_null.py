"""scores of pairs under different groups ─► what two strangers score, however many of the pairs are copies in truth.

Fisher's z of a score is taken for a draw from a mixture. With probability 1 - w strangers: normal (mean, scale). With
probability w copies: nine tenths of them normal, the rest anywhere from 0.6 (or the strangers' mean, if larger) to 0.999. The
copies' mean is at least 0.8 and four of the strangers' standard deviations above theirs, so the two never share the
strangers' bulk between them. EM from several starts, of which the most likely fit is kept: one that takes the copies
for the strangers has nothing to explain the low scores with, and loses. A pair that is more likely a copy is
*suspected*: it is no evidence on strangers, and its image's next best pair takes its place (``Ladder``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.audit_align import Floats
from medtl_dist.data.audit_search import Pairs

NULL_IMAGES = 300
RUNGS = 6  # pairs of one image that are tried at most
_LEAST_SUSPECT = math.atanh(0.6)
_CLIP = 0.999
_TOP = math.atanh(_CLIP)
_LEAST_SCALE, _LEAST_SPREAD = 0.02, 0.2
_LEAST_MIDDLE = math.atanh(0.8)
_ANYWHERE = 0.1
_STARTS = (0.1, 0.25, 0.5, 1.0)  # share of the scores, from below, that a start takes for strangers
_STEPS = 60


class Strangers(NamedTuple):
    """Mean and standard deviation of strangers' z; ``suspected`` bool [scores]: more likely copies."""

    mean: float
    scale: float
    suspected: NDArray[np.bool_]


def fit_strangers(scores: NDArray[np.floating]) -> Strangers:
    """The mixture's fit to scores [n ≥ 2], see the module."""
    z = np.arctanh(np.clip(scores, -_CLIP, _CLIP))
    _, mean, scale, copies = max((_fit(z, share) for share in _STARTS), key=lambda fit: fit[0])
    return Strangers(mean, scale, copies > 0.5)


def _fit(z: Floats, share: float) -> tuple[float, float, float, Floats]:
    """EM from the lowest ``share`` of the scores: ``(log-likelihood, mean, scale, each one's probability of a copy)``."""
    lowest = np.sort(z)[: max(2, round(share * len(z)))]
    mean, scale, weight = float(lowest.mean()), max(float(lowest.std()), _LEAST_SCALE), max(1 - share, 0.01)
    middle, spread = _least_of_copies(mean, scale), 0.5
    likelihood, copies = -math.inf, np.zeros(len(z))
    for _ in range(_STEPS):
        low = min(max(_LEAST_SUSPECT, mean), _TOP - _LEAST_SCALE)
        anywhere = _ANYWHERE / (_TOP - low) + (1 - _ANYWHERE) * _normal(z, middle, spread)
        of_copies = np.where(z >= low, weight * anywhere, 0.0)
        total = np.maximum(of_copies + (1 - weight) * _normal(z, mean, scale), 1e-300)
        likelihood, copies = float(np.log(total).sum()), of_copies / total
        weight = float(copies.mean())
        mean, scale = _moments(z, 1 - copies, -math.inf, _LEAST_SCALE)
        middle, spread = _moments(z, copies, _least_of_copies(mean, scale), _LEAST_SPREAD)
    return likelihood, mean, scale, copies


def _least_of_copies(mean: float, scale: float) -> float:
    return max(_LEAST_MIDDLE, mean + 4 * scale)


def _normal(z: Floats, mean: float, scale: float) -> Floats:
    return np.exp(-0.5 * ((z - mean) / scale) ** 2) / (scale * math.sqrt(2 * math.pi))


def _moments(z: Floats, weights: Floats, least_mean: float, least_scale: float) -> tuple[float, float]:
    """Weighted mean, at least so large, and standard deviation about it, at least so large."""
    size = max(float(weights.sum()), 1e-9)
    mean = max(float((weights * z).sum() / size), least_mean)
    return mean, max(math.sqrt(float((weights * (z - mean) ** 2).sum() / size)), least_scale)


class Ladder:
    """Pairs of other groups of up to 300 random images, each image's the best agreeing first; ``places``: of the
    current pairs, one per image."""

    def __init__(self, found: Pairs, group: NDArray[np.int32]) -> None:
        other = np.flatnonzero(group[found.first] != group[found.second])
        images = np.unique(np.concatenate([found.first[other], found.second[other]]))
        chosen = np.random.default_rng(0).permutation(images)[:NULL_IMAGES]
        near = other[np.isin(found.first[other], chosen) | np.isin(found.second[other], chosen)]
        rungs: defaultdict[int, list[int]] = defaultdict(list)
        for place in near[np.argsort(-found.score[near], kind="stable")].tolist():
            for image in (int(found.first[place]), int(found.second[place])):
                if len(rungs[image]) < RUNGS:
                    rungs[image].append(place)
        self._rungs = [rungs[int(image)] for image in np.sort(chosen)]
        self._at = [0] * len(self._rungs)

    @property
    def places(self) -> NDArray[np.int64]:
        """Positions of the current pairs; a pair of two of the images is there once."""
        return np.unique(np.array([rungs[at] for rungs, at in zip(self._rungs, self._at, strict=True)], np.int64))

    @property
    def last(self) -> NDArray[np.int64]:
        """Positions of each image's least agreeing pair: strangers, even if every image's best is a copy."""
        return np.unique(np.array([rungs[-1] for rungs in self._rungs], np.int64))

    def suspected(self, scores: NDArray[np.floating]) -> NDArray[np.int64]:
        """Those of ``places`` that are copies more likely than not, judged together with ``last``."""
        judged = np.union1d(self.places, self.last)
        if len(judged) < 2:
            return judged[:0]
        return np.intersect1d(judged[fit_strangers(scores[judged]).suspected], self.places)

    def climb_down(self, suspected: NDArray[np.int64]) -> bool:
        """Images whose pair is suspected go on to their next; False when none of them has one left."""
        before, bad = sum(self._at), set(suspected.tolist())
        for image, rungs in enumerate(self._rungs):
            if rungs[self._at[image]] in bad and self._at[image] + 1 < len(rungs):
                self._at[image] += 1
        return sum(self._at) > before
