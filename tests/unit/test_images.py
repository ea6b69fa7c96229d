"""Stored pixels: every kind of file that real folders hold, made upright, 8-bit and free of metadata."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medtl_dist.data import images

RAMP = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (12, 1))  # [12, 24]: wide, dark left, bright right


def saved(tmp_path: Path, image: Image.Image, name: str = "x.png", **options) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16"])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_pixels_survive_every_mode(tmp_path: Path, mode: str, suffix: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(RAMP.astype(np.uint16) * 257)
    elif mode == "LA":
        image = Image.merge("LA", [Image.fromarray(RAMP), Image.new("L", (24, 12), 255)])
    else:
        image = Image.fromarray(RAMP).convert(mode)
    pixels = images.read_image(saved(tmp_path, image, f"x.{suffix}"))
    assert pixels.dtype == np.uint8
    assert images.is_grey(pixels)
    np.testing.assert_array_equal(images.to_channels(pixels, 1), RAMP)


def test_one_bit_and_16_bit_pgm(tmp_path: Path) -> None:
    bits = RAMP > 100
    np.testing.assert_array_equal(images.read_image(saved(tmp_path, Image.fromarray(bits))), bits * np.uint8(255))
    path = tmp_path / "x.pgm"
    path.write_bytes(b"P5 24 12 65535\n" + (RAMP.astype(">u2") * 257).tobytes())
    np.testing.assert_array_equal(images.read_image(path), RAMP)


def test_cmyk_jpeg_is_read_as_rgb(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), (200, 40, 90)).convert("CMYK")
    pixels = images.read_image(saved(tmp_path, image, "x.jpg", quality=100))
    np.testing.assert_allclose(pixels.reshape(-1, 3).mean(0), (200, 40, 90), atol=4)


def test_alpha_is_composited_on_black(tmp_path: Path) -> None:
    color = np.full((4, 4, 4), 200, dtype=np.uint8)
    color[..., 3] = [0, 64, 128, 255]
    pixels = images.read_image(saved(tmp_path, Image.fromarray(color)))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 50, 100, 200])


def test_a_transparent_palette_entry_becomes_black(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8))
    image.putpalette([250, 250, 250, 10, 20, 30])
    pixels = images.read_image(saved(tmp_path, image, transparency=0))
    np.testing.assert_array_equal(pixels, [[[0, 0, 0], [10, 20, 30]], [[10, 20, 30], [0, 0, 0]]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_exif_is_applied(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(RAMP), "x.png", exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(images.read_image(path), expected)


@pytest.mark.parametrize(("bits", "brightest"), [(8, 255), (10, 1023), (12, 4095), (14, 16383), (16, 65535)])
def test_16_bit_files_keep_the_contrast_of_their_depth(bits: int, brightest: int) -> None:
    pixels = np.array([[0, brightest // 2, brightest]], dtype=np.uint16)
    np.testing.assert_array_equal(images.scale_to_8_bit(pixels), [[0, 127, 255]])
    just_above = np.array([[0, min(brightest + 1, 65535)]], dtype=np.uint16)
    assert images.scale_to_8_bit(just_above)[0, 1] == (255 if bits == 16 else {8: 64, 10: 64, 12: 64, 14: 64}[bits])


def test_values_without_a_known_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(images.UnreadableImage, match="outside 0 to 65535"):
        images.scale_to_8_bit(np.array([[-1, 5]]))
    path = saved(tmp_path, Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "x.tiff")
    with pytest.raises(images.UnreadableImage, match="pixel format F"):
        images.read_image(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels: decoding it fails, so what is refused was refused before."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b""))]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (13_000, 13_000), (65_000, 65_000)])
def test_too_many_pixels_are_refused_from_the_header_without_a_warning(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    with pytest.raises(images.UnreadableImage, match="more than 100 Mpx"):
        images.read_image(path)


def test_frames_are_refused_not_cut(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(RAMP), "x.tiff", save_all=True, append_images=[Image.fromarray(RAMP)])
    with pytest.raises(images.UnreadableImage, match="several frames"):
        images.read_image(path)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "text.png", "empty.jpg", "none.png", "folder.png", "x.eps"])
def test_a_bad_file_gives_a_reason_without_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.startswith("cut"):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:1500])
    elif name == "folder.png":
        path.mkdir()
    elif name != "none.png":
        path.write_bytes({"text.png": b"John Doe", "empty.jpg": b"", "x.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n"}[name])
    with pytest.raises(images.UnreadableImage) as caught:
        images.read_image(path)
    reasons = {"none.png": "missing file", "folder.png": "file cannot be opened"}
    assert caught.value.reason == reasons.get(name, "unreadable image")
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason  # noqa: S301 - our own bytes


def test_shrinking_averages_keeps_the_aspect_and_never_enlarges() -> None:
    checks = np.indices((200, 301)).sum(0) % 2 * np.uint8(255)  # aliasing would leave stripes
    small = images.shrink(checks.astype(np.uint8), 50)
    assert small.shape == (50, 75)
    assert np.abs(small.astype(int) - 127).max() <= 3
    assert images.shrink(small, 50) is small
    assert images.shrink(small, 64) is small
    assert images.shrink(small, None) is small
    tall = np.broadcast_to(np.arange(1000, dtype=np.uint8)[:, None, None], (1000, 10, 3))
    assert images.shrink(np.ascontiguousarray(tall), 8).shape == (800, 8, 3)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 70))
def test_the_short_side_is_exact(width: int, height: int, size: int) -> None:
    small = images.shrink(np.zeros((height, width), dtype=np.uint8), size)
    assert min(small.shape) == min(size, width, height)
    assert abs(small.shape[0] / small.shape[1] - height / width) <= max(1, height / width) / min(small.shape)


def test_a_large_jpeg_decoded_small_equals_the_full_decode(tmp_path: Path) -> None:
    y, x = np.mgrid[:1200, :1600]
    smooth = (127 + 60 * np.sin(x / 90) + 60 * np.cos(y / 70)).astype(np.uint8)
    path = saved(tmp_path, Image.fromarray(smooth), "x.jpg", quality=95)
    fast = images.shrink(images.read_image(path, image_size_px=128), 128)
    full = images.shrink(images.read_image(path), 128)
    assert images.read_image(path, image_size_px=128).shape == (300, 400)
    assert fast.shape == full.shape == (128, 171)
    assert np.abs(fast.astype(int) - full).max() <= 2


def test_grey_is_told_from_colour() -> None:
    rgb = np.repeat(RAMP[..., None], 3, axis=2)
    assert images.is_grey(RAMP)
    assert images.is_grey(rgb)
    rgb[3, 3, 0] += images.GREY_TOLERANCE
    assert images.is_grey(rgb)
    rgb[3, 3, 0] += 1
    assert not images.is_grey(rgb)


@pytest.mark.parametrize("encoding", ["png", "jpeg95"])
@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
def test_encoded_bytes_decode_to_the_same_image(encoding: images.Encoding, shape: tuple[int, ...]) -> None:
    y, x = np.mgrid[:20, :30]
    pixels = (4 * x + 3 * y).astype(np.uint8)
    if len(shape) == 3:
        pixels = np.stack([pixels, 255 - pixels, pixels // 2], axis=-1)
    data = images.encode(pixels, encoding)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == ("L" if len(shape) == 2 else "RGB")
        back = np.asarray(image).astype(int)
    assert np.abs(back - pixels).max() <= (0 if encoding == "png" else 6)


def test_a_side_beyond_jpeg_is_a_reason() -> None:
    with pytest.raises(images.UnreadableImage, match="too large a side"):
        images.encode(np.zeros((1, 70_000), dtype=np.uint8), "jpeg95")
