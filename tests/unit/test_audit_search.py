"""Fingerprints, alignment, search, registration and threshold: each against something computed another way."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from audit_sets import texture
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.data import audit_search
from medtl_dist.data.audit_align import align, crop_matrices
from medtl_dist.data.audit_match import compare, fit_threshold, prepare
from medtl_dist.data.audit_search import find_pairs, fit_projection, project
from medtl_dist.data.fingerprint import (
    COLUMNS,
    FLIP_X,
    FLIP_Y,
    NEGATIVE,
    NUM_VARIANTS,
    RECORD,
    ROWS,
    TRANSPOSE,
    coefficients,
    equalise,
    fingerprint,
    is_blank,
    pack_coefs,
    stat,
    turn,
    variant_name,
    variant_operator,
)

NO_CROP = np.array([0, 1, 0, 1], np.float32)


def records_of(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([fingerprint(image[..., None]) for image in images])


def turned(image: np.ndarray, variant: int) -> np.ndarray:
    """The variant of a stored image, by NumPy alone."""
    image = image.T if variant & TRANSPOSE else image
    image = image[:, ::-1] if variant & FLIP_X else image
    image = image[::-1] if variant & FLIP_Y else image
    return np.ascontiguousarray(255 - image if variant & NEGATIVE else image)


@pytest.mark.parametrize("variant", range(NUM_VARIANTS))
def test_a_variant_of_the_record_is_the_record_of_the_variant(variant: int) -> None:
    image = texture(1, 80)
    order, sign = variant_operator(variant)
    expected = coefficients(records_of([turned(image, variant)]))
    np.testing.assert_allclose(coefficients(records_of([image]))[:, order] * sign, expected, atol=0.15)
    np.testing.assert_array_equal(turn(equalise(image), variant), equalise(turned(image, variant)))


def test_names_of_variants() -> None:
    assert variant_name(0) == "as it is"
    assert variant_name(FLIP_X | NEGATIVE) == "negative, flipped left-right"
    clockwise = np.rot90(texture(2, 40), -1)
    assert np.array_equal(turned(texture(2, 40), TRANSPOSE | FLIP_X), clockwise)
    assert variant_name(TRANSPOSE | FLIP_X) == "rotated by 90°"


@given(gamma=st.floats(0.5, 2), number=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_monotone_change_hardly_shows(gamma: float, number: int) -> None:
    image = texture(number, 80)
    changed = np.rint(255 * (image / 255) ** gamma).astype(np.uint8)
    before, after = coefficients(records_of([image, changed]))
    assert np.linalg.norm(before - after) < 0.05 * np.linalg.norm(before)


def test_a_record_tells_pixels_shape_and_brightness() -> None:
    image = np.zeros((40, 40), np.uint8)
    image[:, 20:] = 200
    [record, same, other] = records_of([image, image.copy(), np.where(image == 200, 201, image).astype(np.uint8)])
    assert (record["pixels"] == same["pixels"]).all()
    assert (record["pixels"] != other["pixels"]).any()
    reshaped = fingerprint(np.zeros((20, 80, 1), np.uint8))["pixels"]
    assert (reshaped != fingerprint(np.zeros((40, 40, 1), np.uint8))["pixels"]).any()
    one = np.stack([record])
    facts = {name: stat(one, name)[0] for name in ("left", "right", "mean", "ring", "dark", "bright", "top_right")}
    assert facts == {"left": 0, "right": 200, "mean": 100, "ring": 100, "dark": 0, "bright": 200, "top_right": 200}
    assert record["size"].tolist() == [40, 40]
    blank = records_of([np.full((40, 40), 90, np.uint8), image])
    assert is_blank(blank).tolist() == [True, False]


def test_records_keep_coefficients_to_a_few_percent() -> None:
    coefs = np.linspace(-32, 32, 2 * 135).reshape(2, 135)
    packed = np.zeros(2, RECORD)
    packed["coefs"] = pack_coefs(coefs)
    np.testing.assert_allclose(coefficients(packed), coefs, rtol=0.045, atol=0.01)


def test_crop_matrices_are_crops() -> None:
    """Against a sum of cosines evaluated at the cropped positions, and transformed by OpenCV."""
    rng = np.random.default_rng(0)
    coefs = np.zeros(32)
    coefs[:10] = rng.standard_normal(10)
    positions = 0.04 + 0.9 * (np.arange(32) + 0.5) / 32
    scale = np.where(np.arange(32) == 0, 1, math.sqrt(2)) / math.sqrt(32)
    signal = (np.cos(np.pi * np.outer(positions, np.arange(32))) * scale) @ coefs
    expected = cv2.dct(signal[:, None])[:16, 0]
    found = crop_matrices(np.array(0.04), np.array(0.9)) @ coefs[:16]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_alignment_undoes_a_crop_whichever_image_was_cropped() -> None:
    images = [texture(i) for i in range(60)]
    crops = [image[3:94, 5:95] for image in images]  # start .031 and .052, extent .948 and .938
    records, cropped = records_of(images), records_of(crops)
    projection = fit_projection(records)
    arguments = (coefficients(records), coefficients(cropped), projection.look, projection.scale)
    found = align(*arguments)
    assert np.median(found.score) > 0.93
    part = (3 / 96, 91 / 96, 5 / 96, 90 / 96)
    np.testing.assert_allclose(np.median(found.crop[found.inner], axis=0), part, atol=0.015)
    whole = (-3 / 91, 96 / 91, -5 / 90, 96 / 90)  # of the cropped image, seen from it
    np.testing.assert_allclose(np.median(found.crop[~found.inner], axis=0), whole, atol=0.015)
    back = align(arguments[1], arguments[0], *arguments[2:])
    assert np.median(back.score) > 0.93
    np.testing.assert_allclose(np.median(back.crop[~back.inner], axis=0), part, atol=0.015)
    strangers = align(arguments[0], np.roll(arguments[1], 7, axis=0), *arguments[2:])
    assert np.quantile(strangers.score, 0.95) < 0.8


def planted(count: int, copies: int, seed: int = 0) -> tuple[np.ndarray, set[tuple[int, int]]]:
    """Random records with a common look; the last ``copies`` are cropped variants of the first ones."""
    rng = np.random.default_rng(seed)
    spread = 3 * np.exp(-(ROWS + COLUMNS) / 7)
    records = np.zeros(count, RECORD)
    coefs = 2 * spread + spread * rng.standard_normal((count, len(ROWS)))
    matrices = np.zeros((copies, 16, 16))
    matrices[:, ROWS, COLUMNS] = coefs[:copies]
    matrix = crop_matrices(np.array(0.02), np.array(0.95))
    cropped = (matrix @ matrices @ matrix.T)[:, ROWS, COLUMNS]
    for copy in range(copies):
        order, sign = variant_operator(copy % NUM_VARIANTS)
        coefs[count - copies + copy] = cropped[copy][order] * sign
    records["coefs"] = pack_coefs(coefs)
    return records, {(copy, count - copies + copy) for copy in range(copies)}


def test_search_finds_planted_copies_and_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    records, pairs = planted(1500, 96)
    projection = fit_projection(records)
    exact = find_pairs(records, projection)
    found = set(zip(exact.first.tolist(), exact.second.tolist(), strict=True))
    assert len(found & pairs) >= 94
    assert (exact.first < exact.second).all()
    assert len(found) == len(exact.first)
    for first, second, variant, score in zip(exact.first, exact.second, exact.variant, exact.score, strict=True):
        if (first, second) in pairs and score > 0.9:
            order, sign = variant_operator(int(variant))
            again, _ = variant_operator(int(first) % NUM_VARIANTS)
            # Turning the copy back by the variant found gives the original's sign and place.
            turned_back = coefficients(records[[second]])[:, order] * sign
            cosine = project(records[[first]], projection)[0] @ _projected(turned_back, projection)[0]
            assert cosine > 0.5, (first, variant, again)

    monkeypatch.setattr(audit_search, "MAX_ALL_PAIRS", 100)
    celled = find_pairs(records, projection)
    in_cells = set(zip(celled.first.tolist(), celled.second.tolist(), strict=True))
    assert len(in_cells & pairs) >= 90
    assert (celled.first < celled.second).all()  # nobody is a neighbour of its own
    assert in_cells != found


def test_every_variant_is_searched_in_cells_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images resemble themselves most; that must not decide how alike two images of a large set have to be."""
    monkeypatch.setattr(audit_search, "MAX_ALL_PAIRS", 100)
    records, pairs = planted(9000, 160)
    found = find_pairs(records, fit_projection(records))
    pair_to_variant = dict(
        zip(zip(found.first.tolist(), found.second.tolist(), strict=True), found.variant, strict=True)
    )
    as_they_are = [pair for pair in pairs if pair[0] % NUM_VARIANTS == 0]
    assert sum(pair in pair_to_variant for pair in as_they_are) >= 8
    assert sum(pair in pair_to_variant for pair in pairs) >= 130


def _projected(coefs: np.ndarray, projection: audit_search.Projection) -> np.ndarray:
    vectors = coefs @ projection.axes
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_projection_of_a_variant_is_that_of_the_turned_record() -> None:
    records, _ = planted(300, 10)
    projection = fit_projection(records)
    for variant in (0, 3, 5, 14):
        order, sign = variant_operator(variant)
        expected = _projected(coefficients(records)[:, order] * sign, projection)
        np.testing.assert_allclose(project(records, projection, variant), expected, atol=1e-4)


def test_a_crowd_of_lookalikes_does_not_make_one_huge_cell() -> None:
    vectors = np.ones((3000, 48), np.float32) / math.sqrt(48)
    vectors[:200] = np.random.default_rng(0).standard_normal((200, 48))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    members, centres = audit_search._cells(vectors, 0)
    assert max(map(len, members)) <= 8 * math.sqrt(3000)
    assert sorted(np.concatenate(members)) == list(range(3000))
    assert len(centres) == len(members)


def test_cells_give_real_cosines_and_nearly_the_nearest_of_all() -> None:
    """Against every pair, by brute force."""
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((40, 48)).repeat(50, axis=0) + 0.7 * rng.standard_normal((2000, 48))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    query, other, cosine = audit_search._in_cells(vectors, vectors, audit_search._cells(vectors, 0), 10_000)
    cosines = vectors @ vectors.T
    np.testing.assert_allclose(cosine, cosines[query, other], atol=1e-5)
    np.fill_diagonal(cosines, -1)
    assert (query != other).all()
    assert np.bincount(query).max() == audit_search.NEIGHBOURS
    found = set(zip(query.tolist(), other.tolist(), strict=True))
    assert np.mean([pair in found for pair in enumerate(cosines.argmax(axis=1).tolist())]) > 0.8
    fewer = audit_search._in_cells(vectors, vectors, audit_search._cells(vectors, 0), 500)
    assert len(fewer[0]) == 500
    assert fewer[2].min() >= np.sort(cosine)[-500]


@pytest.mark.parametrize("variant", [0, FLIP_X, TRANSPOSE | FLIP_Y, NEGATIVE | FLIP_Y])
def test_registration_tells_a_copy_from_a_stranger(variant: int) -> None:
    image = texture(5, 160)
    data = cv2.imencode(".jpg", image[6:154, 3:155], [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    copy = cv2.resize(np.asarray(cv2.imdecode(data, 0)), (120, 120), interpolation=cv2.INTER_AREA)
    undo = {TRANSPOSE | FLIP_Y: TRANSPOSE | FLIP_X}.get(variant, variant)
    first, second = prepare(image[..., None]), prepare(turned(copy, variant)[..., None])
    crop = np.array([6 / 160, 148 / 160, 3 / 160, 152 / 160], np.float32)
    assert compare(first, second, undo, crop, True) > 0.9
    assert compare(second, first, variant, crop if not variant & TRANSPOSE else crop[[2, 3, 0, 1]], False) > 0.9
    strangers = [compare(first, prepare(texture(i, 160)[..., None]), 0, NO_CROP, True) for i in range(6, 26)]
    assert max(strangers) < 0.6


def test_the_threshold_lets_through_what_it_says() -> None:
    """z of 300 pairs from a known normal: the quantile of the tail is near the closed form."""
    rng = np.random.default_rng(0)
    z = rng.normal(0.7, 0.15, 300)
    found = fit_threshold(np.tanh(z), compared=1000)
    # P(Z > 4.265) = 1e-5 = 0.01 / 1000; P(Z > 3.09) = 1e-3 = 1 / 1000
    assert found.confirmed == pytest.approx(math.tanh(0.7 + 4.265 * 0.15), abs=0.03)
    assert found.candidate == pytest.approx(math.tanh(0.7 + 3.09 * 0.15), abs=0.03)
    assert found.expected_false == {"confirmed": pytest.approx(0.01, rel=0.1), "candidates": pytest.approx(1, rel=0.1)}
    assert found.null_pairs == 300
    more = fit_threshold(np.tanh(z), compared=100_000)
    assert found.confirmed is not None
    assert more.confirmed is not None
    assert more.confirmed > found.confirmed
    dirty = np.concatenate([np.tanh(z), np.full(60, 0.99)])
    assert (fit_threshold(dirty, compared=1000).confirmed or 0) - found.confirmed < 0.06


def test_few_pairs_make_no_threshold() -> None:
    found = fit_threshold(np.full(39, 0.2), compared=3)
    assert (found.confirmed, found.null_pairs) == (None, 39)
    assert fit_threshold(np.full(40, 0.2), compared=3).confirmed == 0.8
