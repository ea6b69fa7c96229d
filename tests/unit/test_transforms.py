"""Decoding, geometry and augmentation (data/transforms.py)."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.data.transforms import (
    NUM_DRAWS,
    EvalTransform,
    Mode,
    TrainTransform,
    augment_draws,
    decode,
    image_size,
)
from medtl_dist.errors import DataError

MODES: tuple[Mode, ...] = ("letterbox", "center_crop", "squash")


def draws(**named: float) -> np.ndarray:
    """Draws that change nothing but what is named: 1 is the largest crop area; 1/2 the middle of a factor."""
    order = ["area", "x", "y", "flip", "angle", "brightness", "contrast"]
    values = {"area": 1.0, "x": 0.0, "y": 0.0, **named}
    return np.array([values.get(name, 0.5) for name in order] + [0.5])


def ramp(height: int, width: int, channels: int = 1) -> np.ndarray:
    """uint8: brighter to the right and to the bottom, smooth."""
    y, x = np.mgrid[:height, :width]
    grey = 20 + 130 * x / max(width - 1, 1) + 80 * y / max(height - 1, 1)
    return np.repeat(grey[:, :, None], channels, axis=2).astype(np.uint8)


def encode(image: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


# --- decoding ---


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_grey_and_colour_decode_to_the_channels_asked_for(suffix: str) -> None:
    blue = np.zeros((12, 20, 3), np.uint8)
    blue[:, :, 0] = 255  # OpenCV writes blue, green, red
    rgb = decode(encode(blue, suffix), 3)
    assert rgb.shape == (12, 20, 3)
    assert rgb.dtype == np.uint8
    assert (rgb[6, 10] > [-1, -1, 250]).all()
    assert (rgb[6, 10][:2] < 5).all()
    grey = decode(encode(blue, suffix), 1)
    assert grey.shape == (12, 20, 1)
    assert abs(int(grey[6, 10, 0]) - 29) <= 1  # luma of blue: 0.114 · 255


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([".png", ".jpg"]))
def test_the_header_gives_the_size_that_decoding_gives(width: int, height: int, suffix: str) -> None:
    data = encode(np.zeros((height, width), np.uint8), suffix)
    assert image_size(data) == (width, height)
    assert decode(data, 1).shape == (height, width, 1)


def test_progressive_and_commented_jpegs_have_readable_headers() -> None:
    image = ramp(40, 30)
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    comment = b"\xff\xfe" + struct.pack(">H", 1002) + b"\xff\xc0" * 500  # looks like a frame header inside
    tables = b"\xff\xc4\x00\x09" + bytes(range(7))  # 0xC4 is among the frame headers, but is none
    assert image_size(data[:2] + tables + comment + b"\xff" + data[2:]) == (30, 40)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims to be large."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9999))
        + chunk(b"IEND", b"")
    )


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="30000 x 30000 pixels are more than the limit"):
        decode(png_claiming(30_000, 30_000), 1)
    with pytest.raises(DataError, match="100 x 100 pixels are more than the limit of 9999"):
        decode(encode(np.zeros((100, 100), np.uint8), ".jpg"), 1, max_pixels=9999)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "neither JPEG nor PNG"),
        (b"GIF89a" + b"\0" * 100, "neither JPEG nor PNG"),
        (b"<html>", "neither JPEG nor PNG"),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG header"),
        (b"\xff\xd8\xff\xe0\x00\x10", "damaged JPEG header"),
        (b"\xff\xd8\xff" + b"\xff" * 1000, "damaged JPEG header"),
        (b"\xff\xd8\xff\xe0\x00\x00" + b"\0" * 1000, "damaged JPEG header"),
        (png_claiming(0, 5), "0 x 5 pixels"),
        (encode(ramp(30, 30))[:60], "can't be decoded"),
    ],
)
def test_what_is_no_whole_image_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        decode(data, 1)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]), st.binary(max_size=80))
def test_no_bytes_break_the_header_reader(start: bytes, rest: bytes) -> None:
    try:
        width, height = image_size(start + rest)
    except DataError:
        return
    assert width > 0
    assert height > 0


# --- geometry ---


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.sampled_from([1, 3]),
    st.sampled_from(MODES),
    st.integers(0, 2**32),
    st.sampled_from([16, 33]),
)
def test_training_without_augmentation_is_evaluation(
    height: int, width: int, channels: int, mode: Mode, seed: int, size: int
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    shown = EvalTransform(size, mode)(image)
    assert shown.shape == (channels, size, size)
    assert shown.dtype == np.uint8
    assert shown.flags["C_CONTIGUOUS"]
    random = augment_draws(seed, 0, b"k" * 16)
    assert np.array_equal(TrainTransform(size, mode, crop_area_min=1.0)(image, random), shown)


def test_letterbox_keeps_the_aspect_and_everything_in_view() -> None:
    image = np.full((100, 200, 1), 200, np.uint8)
    (shown,) = EvalTransform(64)(image)
    assert (shown[16:48] == 200).all()
    assert not shown[:16].any()
    assert not shown[48:].any()
    (tall,) = EvalTransform(64)(image.transpose(1, 0, 2))
    assert np.array_equal(tall, shown.T)


def test_center_crop_shows_the_middle_and_squash_all_of_it() -> None:
    image = np.zeros((60, 180, 1), np.uint8)
    image[:, 60:120] = 100
    image[:, 120:] = 250
    assert (EvalTransform(60, "center_crop")(image) == 100).all()
    (squashed,) = EvalTransform(60, "squash")(image)
    assert (squashed[:, 0] == 0).all()
    assert (squashed[:, 30] == 100).all()
    assert (squashed[:, 59] == 250).all()


def test_the_same_size_is_the_same_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert np.array_equal(EvalTransform(32)(image), image.transpose(2, 0, 1))


@pytest.mark.parametrize("side", [128, 256, 1000, 1023])
def test_shrinking_does_not_alias(side: int) -> None:
    """A one-pixel checkerboard is grey from afar; picking every k-th pixel would show it black, white or moiré."""
    checkers = (np.indices((side, side)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None]
    inside = EvalTransform(64)(checkers)[0, 1:-1, 1:-1].astype(float)
    assert abs(inside.mean() - 127.5) < 2
    assert inside.std() < 16
    turned = TrainTransform(64, crop_area_min=1.0, rotation_deg=30)(checkers, draws(angle=1.0))[0]
    assert turned[20:44, 20:44].astype(float).std() < 16


@pytest.mark.parametrize("size", [64, 224])
def test_shrinking_agrees_with_area_averaging(size: int) -> None:
    image = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 256, (512, 512), np.uint8), (0, 0), 6)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)  # type: ignore[call-overload]
    (shown,) = EvalTransform(size)(image[:, :, None])
    exact = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    # Two ways of averaging a picture that hardly changes over their footprints.
    assert np.abs(shown.astype(int) - exact).max() <= 6


def test_enlarging_keeps_the_edge() -> None:
    """Fading to black at the border of a 28-pixel image would darken 4 pixels around a 224-pixel one."""
    image = np.full((28, 28, 1), 180, np.uint8)
    assert (EvalTransform(224)(image) == 180).all()
    (turned,) = TrainTransform(224, crop_area_min=1.0, rotation_deg=10)(image, draws(angle=1.0))
    assert set(np.unique(turned)) == {0, 180}
    assert 0.88 < (turned == 180).mean() < 0.95


# --- augmentation ---


@pytest.mark.parametrize(("area", "x", "y"), [(0.0, 0.0, 0.0), (0.0, 0.999, 0.999), (0.5, 0.3, 0.7)])
def test_a_crop_is_the_part_of_the_frame_that_its_draws_name(area: float, x: float, y: float) -> None:
    image = ramp(128, 128)
    transform = TrainTransform(64, crop_area_min=0.25)
    side = round(128 * (0.25 + area * 0.75) ** 0.5)
    left, top = int(x * (129 - side)), int(y * (129 - side))
    expected = EvalTransform(64)(image[top : top + side, left : left + side])
    assert np.array_equal(transform(image, draws(area=area, x=x, y=y)), expected)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from(MODES), st.integers(0, 10**6), st.floats(0, 45))
def test_any_image_and_any_draws_give_a_square(
    height: int, width: int, mode: Mode, seed: int, rotation_deg: float
) -> None:
    transform = TrainTransform(
        16, mode, crop_area_min=0.1, hflip=True, rotation_deg=rotation_deg, brightness=0.5, contrast=0.5
    )
    random = augment_draws(seed, 3, bytes(16))
    image = ramp(height, width, 3)
    shown = transform(image, random)
    assert shown.shape == (3, 16, 16)
    assert np.array_equal(shown, transform(image, random))


def test_a_crop_of_a_letterboxed_image_keeps_its_bars() -> None:
    image = np.full((50, 200, 1), 90, np.uint8)
    (shown,) = TrainTransform(100, crop_area_min=0.64)(image, draws(area=0.0, x=0.5, y=0.0))
    # The frame is 200 x 200 with the image in rows 75 to 125; the crop its upper 160 rows.
    assert not shown[:46].any()
    assert (shown[48:77] == 90).all()
    assert not shown[79:].any()


def test_mirroring_is_off_unless_asked_for_and_then_strikes_half() -> None:
    image = ramp(32, 32)
    upright = EvalTransform(32)(image)
    seen = [TrainTransform(32, crop_area_min=1.0)(image, augment_draws(0, 0, bytes([i]) * 16)) for i in range(50)]
    assert all(np.array_equal(shown, upright) for shown in seen)
    mirrored = 0
    for i in range(200):
        shown = TrainTransform(32, crop_area_min=1.0, hflip=True)(image, augment_draws(0, 0, bytes([i]) * 16))
        mirrored += np.array_equal(shown, upright[:, :, ::-1])
        assert np.array_equal(shown, upright) or np.array_equal(shown, upright[:, :, ::-1])
    assert 70 < mirrored < 130


@pytest.mark.parametrize("channels", [1, 3])
def test_rotation_turns_about_the_centre_by_the_angle_drawn(channels: int) -> None:
    """Against a turn by exactly 90 degrees, which is a permutation of pixels; positive is anticlockwise."""
    image = ramp(64, 64, channels)
    shown = TrainTransform(64, crop_area_min=1.0, rotation_deg=90)(image, draws(angle=1.0))
    expected = np.rot90(image, 1).transpose(2, 0, 1)
    assert np.abs(shown.astype(int) - expected).max() <= 1
    opposite = TrainTransform(64, crop_area_min=1.0, rotation_deg=90)(image, draws(angle=0.0))
    assert np.abs(opposite.astype(int) - np.rot90(image, -1).transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("side", [64, 300])
def test_a_small_rotation_is_close_to_none(side: int) -> None:
    image = ramp(side, side + side // 4)
    still = EvalTransform(64)(image).astype(int)
    turned = TrainTransform(64, crop_area_min=1.0, rotation_deg=0.01)(image, draws(angle=1.0)).astype(int)
    # One pixel at the bars' edges may fall to the other side.
    rows = np.all(still[0] > 0, axis=1)
    inside = np.flatnonzero(rows)[1:-1]
    assert np.abs(turned - still)[:, inside].max() <= 3


def test_rotated_crops_show_what_lies_around_them() -> None:
    image = np.full((100, 100, 1), 77, np.uint8)
    shown = TrainTransform(50, crop_area_min=0.36, rotation_deg=45)(image, draws(area=0.0, x=0.5, y=0.5, angle=1.0))
    assert (shown[0, 3:-3, 3:-3] == 77).all(), "a crop from the middle has no black corners"


def test_brightness_is_a_factor_and_contrast_keeps_the_mean() -> None:
    image = ramp(32, 32)
    plain = EvalTransform(32)(image).astype(float)
    brighter = TrainTransform(32, crop_area_min=1.0, brightness=0.2)(image, draws(brightness=1.0))
    assert np.abs(brighter - np.minimum(1.2 * plain, 255)).max() <= 1
    darker = TrainTransform(32, crop_area_min=1.0, brightness=0.2)(image, draws(brightness=0.0))
    assert np.abs(darker - 0.8 * plain).max() <= 1
    flatter = TrainTransform(32, crop_area_min=1.0, contrast=0.5)(image, draws(contrast=0.0))
    assert abs(flatter.mean() - plain.mean()) < 1
    assert abs(flatter.std() / plain.std() - 0.5) < 0.02


def test_contrast_is_about_the_mean_of_what_is_seen() -> None:
    image = np.zeros((64, 64, 1), np.uint8)
    image[:32] = 200
    shown = TrainTransform(32, crop_area_min=0.25, contrast=0.5)(image, draws(area=0.0, contrast=0.0))
    assert (shown == 200).all(), "a crop of one grey has no contrast to lose"


def test_bars_stay_black_whatever_the_light() -> None:
    image = np.full((20, 40, 1), 200, np.uint8)
    transform = TrainTransform(40, crop_area_min=1.0, brightness=0.5, contrast=0.5)
    assert not transform(image, draws(brightness=1.0, contrast=0.0))[0, :10].any()


def test_draws_are_a_pure_function_of_seed_epoch_and_key() -> None:
    """Golden numbers: a resumed run must augment as before. Never update these."""
    first = augment_draws(1, 2, bytes(range(16)))
    assert first.tolist()[:2] == GOLDEN_DRAWS
    others: list[tuple[int, int, bytes]] = [(2, 2, bytes(range(16))), (1, 3, bytes(range(16))), (1, 2, bytes(16))]
    assert all(not np.array_equal(first, augment_draws(*other)) for other in others)


@pytest.mark.parametrize(
    "knobs", [{}, {"right_angles": True}, {"stain_jitter": 0.3}, {"rotation_deg": 9.0, "hflip": True}]
)
def test_only_the_draws_that_a_view_takes_are_made_and_they_are_the_same(knobs: dict[str, Any]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (140, 150, 3), dtype=np.uint8)
    transform = TrainTransform(32, crop_area_min=0.1, **knobs)
    few = [augment_draws(3, epoch, b"k" * 16, transform.num_draws) for epoch in range(8)]
    for epoch, taken in enumerate(few):
        assert np.array_equal(taken, augment_draws(3, epoch, b"k" * 16)[: len(taken)])
        assert np.array_equal(transform(image, taken), transform(image, augment_draws(3, epoch, b"k" * 16)))
    assert len({transform(image, taken).tobytes() for taken in few}) == 8


GOLDEN_DRAWS = [0.09223482428821339, 0.7089065205140226]


def test_draws_are_uniform() -> None:
    many = np.stack([augment_draws(0, epoch, bytes([i]) * 16) for epoch in range(40) for i in range(100)])
    assert many.shape == (4000, NUM_DRAWS)
    assert many.min() >= 0
    assert many.max() < 1
    # Standard errors: mean 0.0046, variance 0.0012, correlation 0.016; five of each.
    assert np.abs(many.mean(0) - 0.5).max() < 0.023
    assert np.abs(many.var(0) - 1 / 12).max() < 0.006
    assert np.abs(np.corrcoef(many.T) - np.eye(NUM_DRAWS)).max() < 0.08
