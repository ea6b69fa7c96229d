"""image file ─► stored pixels: whatever a folder holds, made upright, 8-bit, grey or RGB, small, and re-encoded.

Pure functions of one image, so that ``predict`` on a raw file can do exactly what packing did:

- **Orientation** of EXIF is applied; all metadata is dropped (it can name a patient).
- **16-bit grey** is scaled linearly from ``[0, 2^b - 1]`` to ``[0, 255]``, ``b`` the smallest of 8, 10, 12, 14, 16 that
  holds the brightest pixel: 12-bit pixels in a 16-bit file keep their contrast, and no image depends on another.
  16-bit colour is read at its top 8 bits.
- **Alpha** is composited on black (the air of a radiograph); palettes, CMYK, YCbCr and 1-bit are converted.
- **Size**: the short side becomes ``image_size_px`` by area averaging, aspect kept; a smaller image is never enlarged.
- Files of several frames (TIFF stacks, animations) are refused rather than cut to the first frame.
"""

from __future__ import annotations

import os
import warnings
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_PIXELS = 100_000_000
JPEG_QUALITY = 95
# An RGB file counts as grey when its channels differ by no more than this (of 255): rounding of a grey image on its
# way through a colour encoder. Files that were saved from grey have exactly equal channels.
GREY_TOLERANCE = 3

Encoding = Literal["jpeg95", "png"]
EXTENSION: dict[str, str] = {"jpeg95": "jpg", "png": "png"}

# Only these decoders are ever tried: no PostScript, no plugin that starts another program.
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
# A stereo or phone JPEG (MPO, opened by the JPEG decoder) is its first frame.
_FIRST_FRAME_IS_THE_IMAGE = ("JPEG", "MPO")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
    """One image that cannot be stored. Carries a reason free of file names, and survives pickling."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)

    @property
    def reason(self) -> str:
        return str(self.args[0])


def read_image(
    path: str | os.PathLike[str], *, image_size_px: int | None = None, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Read one file: upright, uint8 ``[height, width]`` (grey modes) or ``[height, width, 3]`` (RGB), 0 to 255.

    With ``image_size_px`` a large JPEG is decoded at a half, quarter or eighth, never below twice that short side:
    ``shrink`` does the rest.

    Raises: UnreadableImage, with the reason: not an image, truncated, too many pixels, frames, or a pixel format
    without a known range.
    """
    with warnings.catch_warnings():
        # Pillow warns of large images and odd metadata; the limit below is ours, and metadata is dropped.
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=_FORMATS) as image:
                return _pixels(image, image_size_px, max_pixels)
        except UnreadableImage:
            raise
        except FileNotFoundError:
            raise UnreadableImage("missing file") from None
        except Image.DecompressionBombError:
            raise UnreadableImage(_too_large(max_pixels)) from None
        except Exception as error:
            # Damaged bytes make Pillow's decoders raise a dozen kinds of error; their texts can name the file.
            opened = not isinstance(error, OSError) or error.errno is None
            raise UnreadableImage("unreadable image" if opened else "file cannot be opened") from None


def _too_large(max_pixels: int) -> str:
    return f"more than {max_pixels / 1e6:g} Mpx"


def _pixels(image: Image.Image, image_size_px: int | None, max_pixels: int) -> NDArray[np.uint8]:
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImage(_too_large(max_pixels))
    if image.format not in _FIRST_FRAME_IS_THE_IMAGE and getattr(image, "n_frames", 1) > 1:
        raise UnreadableImage("several frames in one file")
    if image_size_px is not None:
        image.draft(None, (2 * image_size_px, 2 * image_size_px))  # pyright: ignore[reportArgumentType]
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged metadata says nothing about the pixels; Pillow raises many kinds here
        orientation = None
    image.load()
    transpose = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return _eight_bit(image if transpose is None else image.transpose(transpose))


def _eight_bit(image: Image.Image) -> NDArray[np.uint8]:
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        return scale_to_8_bit(np.asarray(image))
    if mode in ("LA", "La"):
        grey, alpha = np.moveaxis(np.asarray(image.convert("LA")), -1, 0)
        return _on_black(grey, alpha)
    if mode in ("RGBA", "RGBa", "PA") or "transparency" in image.info:
        pixels = np.asarray(image.convert("RGBA"))
        return _on_black(pixels[..., :3], pixels[..., 3:])
    if mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if mode in ("RGB", "P", "CMYK", "YCbCr", "RGBX", "HSV"):
        return np.asarray(image.convert("RGB"))
    raise UnreadableImage(f"pixel format {mode} has no known range")


def _on_black(color: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return ((color.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)


def scale_to_8_bit(pixels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Scale integers ``[height, width]`` in 0 to 65535 to uint8: ``[0, 2^b - 1]`` onto ``[0, 255]``, rounded, ``b`` the
    smallest of 8, 10, 12, 14, 16 that holds the largest pixel.

    Raises: UnreadableImage, a pixel below 0 or above 65535.
    """
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise UnreadableImage("pixel values outside 0 to 65535")
    full = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits)
    return ((pixels.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)


def shrink(image: NDArray[np.uint8], image_size_px: int | None) -> NDArray[np.uint8]:
    """Area-average uint8 ``[h, w]`` or ``[h, w, 3]`` so that its short side is ``image_size_px``, aspect kept (the long
    side rounded); an image whose short side is not larger is returned as it is."""
    height, width = image.shape[:2]
    short = min(height, width)
    if image_size_px is None or short <= image_size_px:
        return image
    size = (max(1, round(width * image_size_px / short)), max(1, round(height * image_size_px / short)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def is_grey(image: NDArray[np.uint8]) -> bool:
    """True for ``[h, w]``, and for ``[h, w, 3]`` whose channels differ by at most ``GREY_TOLERANCE`` everywhere."""
    if image.ndim == 2:
        return True
    red, green, blue = cv2.split(image)
    return (
        int(cv2.absdiff(red, green).max()) <= GREY_TOLERANCE
        and int(cv2.absdiff(green, blue).max()) <= GREY_TOLERANCE
        and int(cv2.absdiff(red, blue).max()) <= GREY_TOLERANCE
    )


def to_channels(image: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """uint8 ``[h, w]`` or ``[h, w, 3]`` to ``[h, w]`` (1: ITU-R 601 luma, exact where R = G = B) or ``[h, w, 3]``."""
    if channels == 1:
        return image if image.ndim == 2 else np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def encode(image: NDArray[np.uint8], encoding: Encoding) -> bytes:
    """The bytes of uint8 ``[h, w]`` or RGB ``[h, w, 3]`` as JPEG (quality 95, colour not subsampled) or PNG (lossless),
    without any metadata."""
    pixels = np.ascontiguousarray(image if image.ndim == 2 else image[..., ::-1])  # OpenCV wants BGR
    if encoding == "png":
        done, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    else:
        sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY, *sampling])
    if not done:  # JPEG ends at 65,535 px a side
        raise UnreadableImage("too large a side for JPEG")
    return data.tobytes()
