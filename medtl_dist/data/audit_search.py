"""fingerprints ─► pairs worth a closer look: every image's nearest others, as they are, flipped, turned or negated.

Images are compared by 48 numbers: the projection of their coefficients that best tells images apart in spite of
cropping (Fisher's linear discriminant, between the set's images and within simulated crops of one image). The look that
chest X-rays have in common, upright or turned, is taken out first, and the discriminant takes out its shifts; a plain
hash of bits is made of little else.

Up to 8,192 images every pair is compared. Beyond that, images fall into about 2√n cells around centres (k-means), cells
too full are halved until they hold at most 8√n, and each image looks into eight cells per variant: O(n^1.5)
operations, and memory for the records, one variant's candidates and the matches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.audit_align import Floats, align, crop_matrices, unpack
from medtl_dist.data.fingerprint import COLUMNS, NEGATIVE, NUM_VARIANTS, ROWS, coefficients, variant_operator

NUM_DIMENSIONS = 48
MAX_ALL_PAIRS = 8192
NEIGHBOURS = 3  # of each image in each variant that are aligned
_LEAST_COSINE = 0.45  # 95 of 100 crops lie above it; fewer images than this are compared whatever it is
_FEW = 2000
_FIT_SAMPLE = 20_000
_CROPS = 2000
_MAX_CROP = 0.1
_PROBES = 8  # cells that an image looks into, in each variant
_GROUPS = 5 * _PROBES
_PARTS = 3  # of a cell; each gives its best
_BLOCK = 1024
_BLOCK_VALUES = 2**18
# Pairs per image that are aligned at most: as they are, and in each other variant.
_MOST_UPRIGHT, _MOST_TURNED = 2.0, 0.2
_CHUNK = 2**15

Progress = Callable[[str, int, int], None]


class Projection(NamedTuple):
    """``scale`` float32 [135]: spread of the coefficients; ``look`` float32 [135, ≤ 8]: orthonormal directions, in units
    of ``scale``, of the set's mean and its turned copies, which no comparison heeds; ``axes`` float32 [135, 48]."""

    scale: Floats
    look: Floats
    axes: Floats


class Pairs(NamedTuple):
    """Pairs of positions ``first < second``; ``variant``: of the second image, what makes it look like the first;
    ``score``: agreement of the aligned records; ``crop``, ``inner``: see ``audit_align.Alignment``."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    variant: NDArray[np.int64]
    score: Floats
    crop: Floats
    inner: NDArray[np.bool_]

    def take(self, places: NDArray) -> Pairs:
        """The pairs at the given places (positions or a mask)."""
        return Pairs(
            self.first[places],
            self.second[places],
            self.variant[places],
            self.score[places],
            self.crop[places],
            self.inner[places],
        )


def fit_projection(records: NDArray[np.void], seed: int = 0) -> Projection:
    """The discriminant from (a sample of) the set's own records."""
    rng = np.random.default_rng(seed)
    sample = rng.permutation(len(records))[:_FIT_SAMPLE]
    coefs = coefficients(records[sample]).astype(np.float64)
    scale = coefs.std(axis=0) + 1e-2
    look = _common_look(coefs.mean(axis=0), scale)
    rest = np.diag(1 / scale) @ (np.eye(len(scale)) - look @ look.T) @ np.diag(scale)
    between = _shrunk_covariance(coefs @ rest)
    chosen = rng.integers(len(coefs), size=_CROPS)
    lost = rng.uniform(0, _MAX_CROP, (_CROPS, 2))
    starts = lost * rng.uniform(0, 1, (_CROPS, 2))
    y, x = (crop_matrices(starts[:, axis], 1 - lost[:, axis]) for axis in (0, 1))
    cropped = y @ unpack(coefs[chosen].astype(np.float32)) @ x.transpose(0, 2, 1)
    crops = (cropped[:, ROWS, COLUMNS] - coefs[chosen]) @ rest
    within = crops.T @ crops / _CROPS + 0.1 * between
    # Generalised eigenvectors of (between, within), by Cholesky.
    lower = np.linalg.inv(np.linalg.cholesky(within + 1e-6 * np.trace(within) / len(within) * np.eye(len(within))))
    _, vectors = np.linalg.eigh(lower @ between @ lower.T)
    axes = lower.T @ vectors[:, ::-1][:, :NUM_DIMENSIONS]
    axes = rest @ (axes / np.sqrt(np.einsum("ij,ik,kj->j", axes, between, axes)))
    return Projection(scale.astype(np.float32), look.astype(np.float32), axes.astype(np.float32))


def _common_look(mean: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal directions [135, ≤ 8] of the mean as it is, flipped and turned (its negative lies among them): else
    any two images that are turned alike would agree, in what sets them apart from the others."""
    operators = [variant_operator(variant) for variant in range(NEGATIVE)]
    turned = np.stack([mean[order] * sign / scale for order, sign in operators], axis=1)
    vectors, strength, _ = np.linalg.svd(turned, full_matrices=False)
    return vectors[:, strength > 1e-3 * strength[0]]


def _shrunk_covariance(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of few images the covariance is mostly chance: pulled towards one variance per frequency, u + v."""
    variance = np.square(centred).mean(axis=0) + 1e-4
    frequency = ROWS + COLUMNS
    smooth = np.array([variance[frequency == frequency[place]].mean() for place in range(len(variance))])
    weight = 300 / (300 + len(centred))
    return (1 - weight) * (centred.T @ centred) / max(1, len(centred)) + weight * np.diag(smooth)


def project(records: NDArray[np.void], projection: Projection, variant: int = 0) -> Floats:
    """Unit vectors float32 [n, 48] of the given variant of images."""
    order, sign = variant_operator(variant)
    axes = np.empty_like(projection.axes)
    axes[order] = projection.axes * sign[:, None]  # turning the axes back is cheaper than turning every image
    vectors = np.empty((len(records), axes.shape[1]), np.float32)
    for start in range(0, len(records), _CHUNK):
        piece = slice(start, start + _CHUNK)
        vectors[piece] = coefficients(records[piece]) @ axes
        vectors[piece] /= np.maximum(np.linalg.norm(vectors[piece], axis=1, keepdims=True), 1e-6)
    return vectors


def find_pairs(
    records: NDArray[np.void], projection: Projection, seed: int = 0, progress: Progress | None = None
) -> Pairs:
    """The aligned pairs of every image, in every variant, with its ``NEIGHBOURS`` nearest others; each pair once.

    Nearest per variant: should some images of the set be turned, all turned ones resemble each other more than a
    copy resembles its original. Beyond ``MAX_ALL_PAIRS`` images the pairs that agree best, two per image as they are and
    three per image in the other variants together, which bounds memory.
    """
    report = progress or (lambda stage, done, total: None)
    if len(records) < 2:
        nothing = np.zeros(0, np.int64)
        return _aligned(records, projection, nothing, nothing, nothing)
    vectors = project(records, projection)
    few = len(records) <= MAX_ALL_PAIRS
    cells = None if few else _cells(vectors, seed)
    found = []
    for number in range(NUM_VARIANTS):
        report("searching", number, NUM_VARIANTS)
        queries = project(records, projection, number)
        if cells is None:
            query, other, _ = _all_pairs(queries, vectors, seed)
        else:
            most = round(len(records) * (_MOST_UPRIGHT if number == 0 else _MOST_TURNED))
            query, other, _ = _in_cells(queries, vectors, cells, most)
        found.append((query, other, np.full(len(query), number, np.int8)))
    report("searching", NUM_VARIANTS, NUM_VARIANTS)
    query, other, variant = (np.concatenate(column).astype(np.int64) for column in zip(*found, strict=True))
    # The query was turned to look like the other: first is the one that stays.
    swap = query < other
    transposed = variant & 7
    # Of the turns only the two quarter rotations (5, 6) are not their own inverse: they are each other's.
    inverse = np.where(transposed == 5, variant + 1, np.where(transposed == 6, variant - 1, variant))
    first, second = np.minimum(query, other), np.maximum(query, other)
    variant = np.where(swap, inverse, variant)
    _, once = np.unique((first * len(records) + second) * NUM_VARIANTS + variant, return_index=True)
    return _best_variant(_aligned(records, projection, first[once], second[once], variant[once]))


def _aligned(
    records: NDArray[np.void],
    projection: Projection,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    variant: NDArray[np.int64],
) -> Pairs:
    operators = [variant_operator(number) for number in range(NUM_VARIANTS)]
    orders, signs = (np.stack(column) for column in zip(*operators, strict=True))
    parts = []
    for start in range(0, len(first), 2**16):
        piece = slice(start, start + 2**16)
        turned = np.take_along_axis(coefficients(records[second[piece]]), orders[variant[piece]], axis=1)
        turned *= signs[variant[piece]]
        parts.append(align(coefficients(records[first[piece]]), turned, projection.look, projection.scale))
    if not parts:
        empty = np.zeros((0, len(ROWS)), np.float32)
        parts = [align(empty, empty, projection.look, projection.scale)]
    score, crop, inner = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Pairs(first, second, variant, score, crop, inner)


def _best_variant(pairs: Pairs) -> Pairs:
    """Of a pair found in several variants the one that agrees best; sorted by first, second."""
    order = np.lexsort((pairs.variant, -pairs.score, pairs.second, pairs.first))
    pairs = pairs.take(order)
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(pairs.first) != 0) | (np.diff(pairs.second) != 0)
    return pairs.take(new)


def _nearest(query: NDArray, cosine: Floats, most: int) -> NDArray[np.int64]:
    """Positions of each query's largest cosines, at most so many."""
    order = np.lexsort((-cosine, query))
    ranked = query[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    rank = np.arange(len(ranked)) - np.repeat(starts, np.diff(np.r_[starts, len(ranked)]))
    return order[rank < most]


def _least_cosine(queries: Floats, vectors: Floats, seed: int) -> float:
    """The cosine that about ``2 * NEIGHBOURS`` others per query exceed, estimated from a sample; bounds memory."""
    rng = np.random.default_rng([seed, 1])
    some = rng.permutation(len(vectors))
    cosines = queries[some[:256]] @ vectors[some[:8192]].T
    np.fill_diagonal(cosines, -1)  # images with themselves
    floor = _LEAST_COSINE if len(vectors) > _FEW else -1.0
    return max(floor, float(np.quantile(cosines, max(0.0, 1 - 2 * NEIGHBOURS / len(vectors)))))


Found = tuple[NDArray[np.int32], NDArray[np.int32], Floats]


def _all_pairs(queries: Floats, vectors: Floats, seed: int) -> Found:
    """Of every query the ``NEIGHBOURS`` others most alike: ``(queries, others, cosines)``."""
    least = _least_cosine(queries, vectors, seed)
    parts = []
    for start in range(0, len(queries), _BLOCK):
        cosines = queries[start : start + _BLOCK] @ vectors.T
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -1
        place, other = np.nonzero(cosines >= least)
        parts.append(((place + start).astype(np.int32), other.astype(np.int32), cosines[place, other]))
    query, other, cosine = (np.concatenate(column) for column in zip(*parts, strict=True))
    keep = _nearest(query, cosine, NEIGHBOURS)
    return query[keep], other[keep], cosine[keep]


def _in_cells(queries: Floats, vectors: Floats, cells: tuple[list[NDArray[np.int32]], Floats], most: int) -> Found:
    """Of each query and each third of its eight cells the member most alike; of these 24 the ``NEIGHBOURS`` best, and of
    all queries' together the ``most`` best: ``(queries, others, cosines)``."""
    members, centres = cells
    nearest = _nearest_cells(queries, centres)
    order = np.argsort(nearest, axis=None, kind="stable")
    edges = np.searchsorted(nearest.ravel()[order], np.arange(len(centres) + 1))
    others = np.zeros((len(queries), _PROBES, _PARTS), np.int32)
    cosines = np.full((len(queries), _PROBES, _PARTS), -1, np.float32)
    for cell, inside in enumerate(members):
        visits = order[edges[cell] : edges[cell + 1]]
        rows = -(-len(inside) // _PARTS)
        crowd = np.zeros((_PARTS * rows, vectors.shape[1]), np.float32)  # the rest of the last part is like nothing
        crowd[: len(inside)] = vectors[inside]
        step = max(1, _BLOCK_VALUES // len(crowd))  # what fits the processor's cache
        for start in range(0, len(visits), step):
            query, probe = np.divmod(visits[start : start + step], _PROBES)
            found = queries[query] @ crowd.T
            own = np.minimum(np.searchsorted(inside, query), len(inside) - 1)
            itself = np.flatnonzero(inside[own] == query)
            found[itself, own[itself]] = -1
            best = found.reshape(len(query), _PARTS, rows).argmax(axis=2) + np.arange(_PARTS) * rows
            cosines[query, probe] = np.take_along_axis(found, best, axis=1)
            others[query, probe] = inside[np.minimum(best, len(inside) - 1)]
    cosines = cosines.reshape(len(queries), _PROBES * _PARTS)
    others = others.reshape(len(queries), _PROBES * _PARTS)
    kept = np.argpartition(-cosines, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    cosine = np.take_along_axis(cosines, kept, axis=1).ravel()
    places = np.flatnonzero(cosine >= _LEAST_COSINE)
    if len(places) > most:
        places = places[np.sort(np.argpartition(-cosine[places], most)[:most])]
    other = np.take_along_axis(others, kept, axis=1).ravel()[places]
    return (places // NEIGHBOURS).astype(np.int32), other, cosine[places]


def _nearest_cells(queries: Floats, centres: Floats) -> NDArray[np.int32]:
    """int32 [n, 8]: near cells of each query, the nearest first. Each fortieth of the centres gives its best, of which
    these are the eight best: one pass over the cosines, and most of the eight nearest."""
    rows = -(-len(centres) // _GROUPS)
    padded = np.zeros((_GROUPS * rows, centres.shape[1]), np.float32)
    padded[: len(centres)] = centres
    nearest = np.empty((len(queries), _PROBES), np.int32)
    step = max(1, _BLOCK_VALUES // len(padded))
    for start in range(0, len(queries), step):
        cosines = queries[start : start + step] @ padded.T
        cosines[:, len(centres) :] = -2
        best = cosines.reshape(len(cosines), _GROUPS, rows).argmax(axis=2) + np.arange(_GROUPS) * rows
        kept = np.argsort(-np.take_along_axis(cosines, best, axis=1), axis=1)[:, :_PROBES]
        nearest[start : start + step] = np.take_along_axis(best, kept, axis=1)
    return np.minimum(nearest, len(centres) - 1)


def _cells(vectors: Floats, seed: int) -> tuple[list[NDArray[np.int32]], Floats]:
    """Members (sorted positions) and centre of every cell; none has more than ``8 √n`` members."""
    rng = np.random.default_rng([seed, 2])
    count = max(_PROBES, round(2 * math.sqrt(len(vectors))))
    sample = vectors[rng.permutation(len(vectors))[: 32 * count]]
    centres = sample[:count].copy()
    for _ in range(4):
        cell = _nearest_cells(sample, centres)[:, 0]
        sums = np.zeros_like(centres)
        np.add.at(sums, cell, sample)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norms > 0, sums / np.maximum(norms, 1e-6), centres)
    cell = _nearest_cells(vectors, centres)[:, 0]
    order = np.argsort(cell, kind="stable").astype(np.int32)
    edges = np.searchsorted(cell[order], np.arange(count + 1))
    waiting = [order[low:high] for low, high in itertools.pairwise(edges) if high > low]
    most = round(8 * math.sqrt(len(vectors)))
    members: list[NDArray[np.int32]] = []
    while waiting:
        inside = waiting.pop()
        if len(inside) <= most:
            members.append(np.sort(inside))
            continue
        # A crowd (images that all look alike): halved along its widest direction, whatever that is.
        crowd = vectors[inside]
        along = np.argsort(crowd[:, crowd.var(axis=0).argmax()], kind="stable")
        waiting += [inside[along[: len(along) // 2]], inside[along[len(along) // 2 :]]]
    members.sort(key=lambda inside: int(inside[0]))
    means = np.stack([vectors[inside].mean(axis=0) for inside in members])
    return members, means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-6)
