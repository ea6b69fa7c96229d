"""bytes of an image ─► the uint8 square that the model sees; OpenCV only, normalisation is the device's work.

Geometry, in source pixels. The *frame* is what evaluation shows: ``letterbox`` the smallest centred square around the
whole image (black bars, nothing lost, the default), ``center_crop`` the largest centred square inside it, ``squash``
the image itself, aspect given up. Training shows a random crop of the same frame, so that without augmentation the
two are the same pixels. Both go through one resampling: bilinear, after averaging over k×k blocks where more than
2 source pixels fall on one (k = floor of that ratio), so that nothing aliases.

Augmentation of a sample is a pure function of (seed, epoch, key), or of (seed, view, key) where an image has so many views
and no more: see ``augment_draws`` and ``view_of``.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from medtl_dist.data.augment import StainModel, restain, right_angle
from medtl_dist.errors import DataError

Image = npt.NDArray[Any]  # always uint8; OpenCV's stubs promise less
Draws = npt.NDArray[np.floating]
Mode = Literal["letterbox", "center_crop", "squash"]

MAX_PIXELS = 64 * 2**20
NUM_DRAWS = 16
MIXING = 2  # the block of draws that mixing images takes; the views take blocks 0 and 1

_BLOCK_DRAWS = 8  # as many as one BLAKE2b digest holds

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_BOUND_BITS = 4  # sub-pixel bits of the polygon that bounds a rotated image


@dataclass(frozen=True)
class EvalTransform:
    """uint8 [h, w, C] to uint8 [C, S, S]: the whole frame, the same every time."""

    image_size_px: int
    mode: Mode = "letterbox"

    def __call__(self, image: Image) -> Image:
        return _channels_first(_show(image, _frame(image, self.mode), self.image_size_px))


@dataclass(frozen=True)
class TrainTransform:
    """uint8 [h, w, C] to uint8 [C, S, S]: a random crop of the frame, perhaps flipped, turned, brighter, flatter.

    ``crop_area_min``: least share of the frame's area in (0, 1], the aspect kept. ``hflip``: mirrors half of the
    samples; off by default, since it moves the heart. ``rotation_deg``: up to so many degrees either way, about the
    crop's centre. ``brightness``, ``contrast``: factors from [1 - x, 1 + x], x in [0, 1); contrast about the crop's
    own mean. Black bars stay black. For slides (data/augment.py): ``right_angles`` turns by 0, 90, 180 or 270
    degrees; ``stain_jitter`` varies the amounts of stain by factors from [1 - x, 1 + x].
    """

    image_size_px: int
    mode: Mode = "letterbox"
    crop_area_min: float = 0.8
    hflip: bool = False
    rotation_deg: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    right_angles: bool = False
    stain_jitter: float = 0.0
    stain_model: StainModel = "hematoxylin_eosin"

    @property
    def num_draws(self) -> int:
        """How many draws an image takes: those of slides come after the others, and cost as much again."""
        return NUM_DRAWS if self.right_angles or self.stain_jitter > 0 else _BLOCK_DRAWS

    def __call__(self, image: Image, draws: Draws) -> Image:
        left, top, width, height = _frame(image, self.mode)
        # One draw per knob whether it is on or not: turning a knob leaves the others' randomness alone.
        area, x, y, flip, angle, brightness, contrast = draws[:7].tolist()
        side = (self.crop_area_min + area * (1.0 - self.crop_area_min)) ** 0.5
        crop_width, crop_height = max(1, round(width * side)), max(1, round(height * side))
        box = (
            left + int(x * (width - crop_width + 1)),
            top + int(y * (height - crop_height + 1)),
            crop_width,
            crop_height,
        )
        gain = 1.0 + self.brightness * (2.0 * brightness - 1.0)
        slope = 1.0 + self.contrast * (2.0 * contrast - 1.0)
        shown = _show(
            image, box, self.image_size_px, turn_deg=self.rotation_deg * (2.0 * angle - 1.0), gain=gain, slope=slope
        )
        if self.hflip and flip < 0.5:
            shown = cv2.flip(shown, 1)
        if self.right_angles:
            shown = right_angle(shown, float(draws[8]))
        if self.stain_jitter > 0:
            shown = restain(shown, draws[9:12], self.stain_jitter, self.stain_model)
        return _channels_first(shown)


def augment_draws(seed: int, epoch: int, key: bytes, num: int = NUM_DRAWS) -> Draws:
    """float64 [``num``] uniform in [0, 1), 8 or 16: those of a sample's view, the same on every machine and version.

    ``epoch``: or the number of the view, where the views of an image are numbered."""
    if num == _BLOCK_DRAWS:
        return draws_of(seed, epoch, key, 0)
    return np.concatenate([draws_of(seed, epoch, key, block) for block in range(num // _BLOCK_DRAWS)])


def view_of(key: bytes, epoch: int, views: int) -> int:
    """Which of an image's ``views`` training views an epoch shows: (hash(key) + epoch) mod views.

    Over ``views`` epochs an image shows each of them once, and in every epoch each view is shown by about as many images.
    """
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") + epoch) % views


def draws_of(seed: int, epoch: int, key: bytes, block: int) -> Draws:
    """float64 [8] uniform in [0, 1): BLAKE2b of (seed, epoch, key); a new ``block`` leaves the others alone."""
    person = struct.pack("<Q", block)  # block 0: as without one
    digest = hashlib.blake2b(
        struct.pack("<QQ", seed, epoch) + key, digest_size=8 * _BLOCK_DRAWS, person=person
    ).digest()
    return (np.frombuffer(digest, "<u8") >> np.uint64(11)) * 2.0**-53


def decode(data: bytes | memoryview, channels: int, max_pixels: int = MAX_PIXELS) -> Image:
    """A JPEG or PNG as uint8 [height, width, channels]; channels 1 (grey) or 3 (RGB).

    Raises: DataError, another format, more pixels than ``max_pixels`` by its header, or damaged.
    """
    width, height = image_size(data)
    # Before decoding: a few kilobytes of PNG can claim (and then fill) gigabytes.
    if width * height > max_pixels:
        raise DataError(f"{width} x {height} pixels are more than the limit of {max_pixels}")
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:
        image = None
    if image is None:
        raise DataError("the image can't be decoded")
    if channels == 1:
        return image.reshape(image.shape[0], image.shape[1], 1)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """Width and height by the header of a JPEG or PNG, nothing decoded.

    Raises: DataError, another format or a damaged header.
    """
    if data[:8] == _PNG:
        if len(data) < 33 or data[12:16] != b"IHDR":
            raise DataError("damaged PNG header")
        width, height = struct.unpack_from(">II", data, 16)
    elif data[:3] == _JPEG:
        width, height = _jpeg_size(data)
    else:
        raise DataError("neither JPEG nor PNG")
    if width == 0 or height == 0:
        raise DataError(f"an image of {width} x {height} pixels")
    return width, height


def _jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """Walks the marker segments up to the frame header, SOF0 … SOF15 (ITU-T T.81, B.1.1.3 and B.2.2)."""
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        elif 0xD0 <= marker <= 0xD9 or marker == 0x01:  # markers without a segment
            at += 2
        else:
            at += 2 + max(2, struct.unpack_from(">H", data, at + 2)[0])
    raise DataError("damaged JPEG header")


def _frame(image: Image, mode: Mode) -> tuple[int, int, int, int]:
    """left, top, width, height in source pixels of what evaluation shows; may reach outside the image."""
    height, width = image.shape[:2]
    if mode == "squash":
        return 0, 0, width, height
    side = max(width, height) if mode == "letterbox" else min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def _show(
    image: Image,
    box: tuple[int, int, int, int],
    size: int,
    *,
    turn_deg: float = 0.0,
    gain: float = 1.0,
    slope: float = 1.0,
) -> Image:
    """The box of the image (left, top, width, height; black outside the image) as uint8 [size, size, C or nothing]."""
    left, top, width, height = box
    # A turned square reaches beyond the box by (√2 - 1) / 2 < 0.21 of its side.
    margin = 0 if turn_deg == 0.0 else max(width, height) * 21 // 100 + 2
    x0, y0 = max(left - margin, 0), max(top - margin, 0)
    x1, y1 = min(left + width + margin, image.shape[1]), min(top + height + margin, image.shape[0])
    if x1 <= x0 or y1 <= y0:  # a small crop of a long image can show nothing but bars
        return np.zeros((size, size, image.shape[2]), np.uint8)
    part = _relight(image[y0:y1, x0:x1], gain, slope)
    blocks = max(1, width // size), max(1, height // size)
    box = (left - x0, top - y0, width, height)
    small = _shrink(part, *blocks)
    if turn_deg == 0.0:
        return _place(small, part.shape, box, size)
    return _turn(small, part.shape, box, size, blocks=blocks, turn_deg=turn_deg)


def _relight(part: Image, gain: float, slope: float) -> Image:
    """slope · (gain · v - mean) + mean, rounded and clipped, where mean is that of gain · v."""
    if gain == 1.0 and slope == 1.0:
        return part
    channels = part.shape[2]
    mean = gain * sum(cv2.mean(part)[:channels]) / channels
    return cv2.addWeighted(part, slope * gain, part, 0.0, (1.0 - slope) * mean)


def _shrink(part: Image, block_x: int, block_y: int) -> Image:
    """The means of blocks; the last ones are filled up with the edge."""
    if block_x == 1 and block_y == 1:
        return part
    # Whole blocks only: OpenCV's area average is 50 times slower at a ratio that is not whole.
    right, bottom = -part.shape[1] % block_x, -part.shape[0] % block_y
    if right or bottom:
        part = cv2.copyMakeBorder(part, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    shape = (part.shape[1] // block_x, part.shape[0] // block_y)
    return cv2.resize(part, shape, interpolation=cv2.INTER_AREA)


def _place(small: Image, part_shape: tuple[int, ...], box: tuple[int, int, int, int], size: int) -> Image:
    """Resizes the part into its place in the square."""
    left, top, width, height = box
    u0, u1 = _span(-left, part_shape[1] - left, width, size)
    v0, v1 = _span(-top, part_shape[0] - top, height, size)
    shown = cv2.resize(small, (u1 - u0, v1 - v0), interpolation=cv2.INTER_LINEAR)
    if (u1 - u0, v1 - v0) == (size, size):
        return shown
    square = np.zeros((size, size, *shown.shape[2:]), np.uint8)
    square[v0:v1, u0:u1] = shown
    return square


def _span(start: int, stop: int, length: int, size: int) -> tuple[int, int]:
    """Source pixels [start, stop) of a box of ``length`` as whole pixels of ``size``: at least one."""
    low = min(round(start * size / length), size - 1)
    return low, max(round(stop * size / length), low + 1)


def _turn(
    small: Image,
    part_shape: tuple[int, ...],
    box: tuple[int, int, int, int],
    size: int,
    *,
    blocks: tuple[int, int],
    turn_deg: float,
) -> Image:
    """Warps the part about the box's centre; what no source pixel covers is black."""
    left, top, width, height = box
    radians = np.deg2rad(turn_deg)
    cos, sin = float(np.cos(radians)), float(np.sin(radians))
    # Pixel u of the square has its centre at u + 1/2: with d = u + 1/2 - size / 2 the source is centre + scale · R · d.
    turn = np.array([[cos, -sin], [sin, cos]])
    scale = np.array([width / size, height / size])
    centre = np.array([left + width / 2, top + height / 2])
    forward = scale[:, None] * turn
    offset = centre + forward @ np.full(2, 0.5 - size / 2)
    per_block = np.array(blocks, float)
    matrix = np.column_stack([forward / per_block[:, None], offset / per_block - 0.5])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    # The edge is repeated and then cut off, since fading to black would darken half a (large) source pixel.
    shown = cv2.warpAffine(small, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    corners = np.array([[0, 0], [part_shape[1], 0], [part_shape[1], part_shape[0]], [0, part_shape[0]]], float)
    bounds = (corners - centre) / scale @ turn + size / 2 - 0.5
    covered = np.zeros((size, size), np.uint8)
    points = np.round(bounds * 2**_BOUND_BITS).astype(np.int32)
    cv2.fillConvexPoly(covered, points, 255, lineType=cv2.LINE_8, shift=_BOUND_BITS)
    return cv2.bitwise_and(shown, shown, mask=covered)


def _channels_first(square: Image) -> Image:
    """uint8 [S, S] or [S, S, C] to contiguous [C, S, S]; OpenCV drops a single channel's axis."""
    if square.ndim == 2:
        return square[None]
    if square.shape[2] == 1:
        return square[None, :, :, 0]
    return np.stack(cv2.split(square))
