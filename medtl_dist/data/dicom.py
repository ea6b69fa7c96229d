"""DICOM file ─► uint8 pixels: one frame decoded by pydicom's plugins and rendered as its tags, or the set's policy, say.

A function of the file and of a ``Rendering`` (plain JSON in ``dataset.json`` and in checkpoints), so that ``predict`` on a
raw file does exactly what packing did. pydicom quotes values in its warnings, logs and errors; none of these leaves
this module: an unreadable file is an ``UnreadableImage`` with a reason of our own.
"""

from __future__ import annotations

import logging
import math
import os
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.dicom_window import FUNCTIONS, Grey, Lut, Percentiles, Range, Rescale, Window, render
from medtl_dist.data.images import MAX_PIXELS, UnreadableImage
from medtl_dist.errors import UserError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

FRAMES = ("single", "first", "middle", "all")
PERCENTILES = (0.5, 99.5)
MAX_FRAMES = 10_000
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
_DEFLATED = "1.2.840.10008.1.2.1.99"
_VRS = frozenset(b"AE AS CS DA DS DT FD FL IS LO LT OB OW PN SH SL SS ST TM UI UL UN US UT".split())


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


def require_pydicom() -> None:
    """Raises: UserError, the extra ``dicom`` is not installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise UserError('DICOM needs pydicom, which is not installed: pip install "medtl_dist[dicom]"') from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom and its plugins from saying anything: their warnings and logs quote the file's values."""
    from pydicom import config

    mode, disabled = config.settings.reading_validation_mode, logging.root.manager.disable
    config.settings.reading_validation_mode = config.IGNORE
    logging.disable(logging.CRITICAL)  # the plugins set the levels of their loggers when imported
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        config.settings.reading_validation_mode = mode


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file starts as DICOM: the magic word, or, in files older than it, three plausible elements in order.

    Raises: OSError, the file cannot be opened.
    """
    if not os.path.isfile(path):  # a pipe would keep us waiting
        return False
    with open(path, "rb") as file:
        start = file.read(1024)
        return start[128:132] == b"DICM" or _plausible_elements(start, os.fstat(file.fileno()).st_size)


def _plausible_elements(start: bytes, size: int) -> bool:
    """Whether little-endian elements of group 0002 or 0008 come first, with rising tags and lengths that fit."""
    place, previous = 0, (0, 0)
    for _ in range(3):
        if len(start) < place + 12:
            return False
        group, element = struct.unpack_from("<HH", start, place)
        if group not in (0x0002, 0x0008) or (group, element) < previous or element > 0x3010:
            return False
        if start[place + 4 : place + 6] in _VRS:
            long = start[place + 4 : place + 6] in (b"OB", b"OW", b"UN", b"UT")
            length, header = (struct.unpack_from("<I", start, place + 8)[0], 12) if long else (
                struct.unpack_from("<H", start, place + 6)[0], 8
            )  # fmt: skip
        else:
            length, header = struct.unpack_from("<I", start, place + 4)[0], 8
        if length % 2 or place + header + length > size:
            return False
        previous = (group, element + 1)
        place += header + length
    return True


def read_header(file: BinaryIO) -> Dataset:
    """Everything before the pixels; the file is left at the pixel data element. Call within ``quiet``.

    Raises: UnreadableImage, not a DICOM data set, a damaged or a deflated one.
    """
    from pydicom import dcmread

    start = file.read(4096)
    file.seek(0)
    if _DEFLATED.encode() + b"\0" in start[:2048] and start[128:132] == b"DICM":
        raise UnreadableImage("deflated DICOM")  # to look at it is to inflate it whole, whatever its size
    try:
        return dcmread(file, stop_before_pixels=True, force=True)
    except Exception:  # damaged bytes raise a dozen kinds of error, whose texts quote them
        raise UnreadableImage("damaged DICOM header") from None


def text_of(header: Dataset, keyword: str) -> str:
    """The value of a tag as text, several joined by a backslash; "" where absent, empty or unreadable."""
    try:
        value = header.get(keyword)
    except Exception:
        return ""
    if value is None or isinstance(value, bytes):
        return ""
    many = value if isinstance(value, list | tuple) or type(value).__name__ == "MultiValue" else [value]
    return "\\".join(str(item).strip().strip("\0").strip() for item in many)


def number_of(header: Dataset, keyword: str) -> float | None:
    """The first value of a numeric tag; None where absent, empty, unreadable or not finite."""
    try:
        value = float(text_of(header, keyword).split("\\")[0])
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def num_frames(header: Dataset) -> int:
    """``NumberOfFrames``, 1 where absent or not a count."""
    return int(max(1, number_of(header, "NumberOfFrames") or 1))


def chosen_frames(frames: str, count: int) -> list[int]:
    """The frames of a file that become images, -1 for a file of one; none of several under ``single``."""
    if count == 1:
        return [-1]
    return {"single": [], "first": [0], "middle": [count // 2], "all": list(range(count))}[frames]


def read_dicom(
    path: str | os.PathLike[str], frame: int, rendering: Rendering, *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """One frame (-1: of a file of one) as uint8 [height, width], or [height, width, 3] for colour.

    Raises: UnreadableImage, with the reason, which holds no value of the file.
    """
    with quiet():
        try:
            with open(path, "rb") as file:
                header = read_header(file)
                _check_format(header, frame, max_pixels)
                syntax = _transfer_syntax(header)
                _check_codestream(file, header, frame, syntax)
                file.seek(0)
                pixels = _decode(file, header, frame, syntax)
        except UnreadableImage:
            raise
        except FileNotFoundError:
            raise UnreadableImage("missing file") from None
        except OSError:
            raise UnreadableImage("file cannot be opened") from None
        if pixels.ndim == 3:
            return _eight_bit(pixels, header)
        grey, _ = grey_of(header, frame, rendering)
        return render(pixels, grey)


def _check_format(header: Dataset, frame: int, max_pixels: int) -> None:
    rows, columns = (number_of(header, keyword) or 0 for keyword in ("Rows", "Columns"))
    if rows < 1 or columns < 1:
        raise UnreadableImage("no image size in the DICOM header")
    if rows * columns > max_pixels:
        raise UnreadableImage(f"more than {max_pixels / 1e6:g} Mpx")
    if not max(frame, 0) < num_frames(header) <= MAX_FRAMES:
        raise UnreadableImage("no such frame" if num_frames(header) <= MAX_FRAMES else f"more than {MAX_FRAMES} frames")
    if frame < 0 and num_frames(header) > 1:
        raise UnreadableImage("several frames in one file")
    if text_of(header, "PhotometricInterpretation") not in _GREY + _COLOUR:
        raise UnreadableImage("unknown photometric interpretation")
    allocated, stored = number_of(header, "BitsAllocated"), number_of(header, "BitsStored")
    if allocated not in (8, 16) or stored is None or not 1 <= stored <= allocated:
        raise UnreadableImage("pixels of other than 8 or 16 bits")
    if number_of(header, "HighBit") not in (None, stored - 1):
        raise UnreadableImage("pixels that do not start at the lowest bit")


def _transfer_syntax(header: Dataset) -> str:
    meta = getattr(header, "file_meta", None)
    given = "" if meta is None else text_of(meta, "TransferSyntaxUID")
    if given:
        return given
    implicit, little = header.original_encoding
    if not little:
        return "1.2.840.10008.1.2.2"
    return "1.2.840.10008.1.2" if implicit else "1.2.840.10008.1.2.1"


def _check_codestream(file: BinaryIO, header: Dataset, frame: int, syntax: str) -> None:
    """Compare the size that a compressed frame says of itself with the header's, before a decoder allocates it."""
    from pydicom.encaps import get_frame

    if not syntax.startswith("1.2.840.10008.1.2.4."):
        return
    try:
        head = file.read(12)  # tag, VR, reserved, undefined length; implicit VR cannot be encapsulated
        if head[8:12] != b"\xff\xff\xff\xff":
            raise UnreadableImage("damaged pixel data")
        encoded = get_frame(file, max(frame, 0), number_of_frames=num_frames(header))
    except UnreadableImage:
        raise
    except Exception:
        raise UnreadableImage("damaged pixel data") from None
    size = codestream_size(encoded)
    if size is not None and size != (number_of(header, "Rows"), number_of(header, "Columns")):
        raise UnreadableImage("compressed pixels of another size than the header's")


def codestream_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) that a JPEG, JPEG-LS or JPEG 2000 stream declares; None if it is none of these."""
    start = data.find(b"\xff\x4f\xff\x51", 0, 256)
    if start >= 0 and len(data) >= start + 24:
        right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
        return bottom - top, right - left
    place = 2
    while data[:2] == b"\xff\xd8" and place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">HH", data, place + 5)
        place += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, place + 2)[0]
    return None


def _decode(file: BinaryIO, header: Dataset, frame: int, syntax: str) -> NDArray[np.integer]:
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.pixels.utils import pixel_array

    try:
        pixels = pixel_array(file, index=max(frame, 0), transfer_syntax_uid=syntax)
        if text_of(header, "PhotometricInterpretation") == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, header)
    except Exception:
        name = _syntax_name(syntax)
        raise UnreadableImage(f"pixels that cannot be decoded ({name})") from None
    shape = tuple(int(number_of(header, keyword) or 0) for keyword in ("Rows", "Columns"))
    if pixels.shape not in (shape, (*shape, 3)):
        raise UnreadableImage("pixels of another shape than the header's")
    if (pixels.ndim == 2) != (text_of(header, "PhotometricInterpretation") in _GREY):
        raise UnreadableImage("pixels of another number of channels than the header's")
    return pixels


def _syntax_name(syntax: str) -> str:
    from pydicom.uid import UID

    known = UID(syntax)
    # The name of an unknown UID is the UID, which is a value of the file.
    return "an unknown transfer syntax" if known.name == syntax else known.name


def _eight_bit(pixels: NDArray[np.integer], header: Dataset) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels, dtype=np.uint8)
    bits = number_of(header, "BitsStored") or 16
    if text_of(header, "PhotometricInterpretation") == "PALETTE COLOR":
        bits = 16
    full = 2**bits - 1
    return np.floor(np.clip(pixels, 0, full) / full * 255 + 0.5).astype(np.uint8)


def grey_of(header: Dataset, frame: int, rendering: Rendering) -> tuple[Grey, str]:
    """What turns a grey frame's stored values into pixels, and where the window comes from: ``VOI LUT``, ``LINEAR``,
    ``LINEAR_EXACT``, ``SIGMOID``, ``percentile`` or ``fixed``.

    Raises: UnreadableImage, a modality transformation that cannot be used.
    """
    signed = number_of(header, "PixelRepresentation") == 1
    modality = _modality(_macro(header, frame, "PixelValueTransformationSequence"), signed)
    window: Window | Lut | Range | Percentiles
    if rendering.policy == "fixed":
        window, source = Range(rendering.low, rendering.high), "fixed"
    else:
        window, source = Percentiles(rendering.low, rendering.high), "percentile"
        if rendering.policy == "tags":
            found = _window(_macro(header, frame, "FrameVOILUTSequence"), signed or _negative(modality))
            if found is not None:
                window, source = found, (found.function if isinstance(found, Window) else "VOI LUT")
    return Grey(_padding(header, signed), modality, window, inverted(header)), source


def inverted(header: Dataset) -> bool:
    """Whether the smallest value is to be shown white: as PresentationLUTShape says, else for MONOCHROME1."""
    shape = text_of(header, "PresentationLUTShape")
    if shape in ("INVERSE", "IDENTITY"):
        return shape == "INVERSE"
    return text_of(header, "PhotometricInterpretation") == "MONOCHROME1"


def _macro(header: Dataset, frame: int, keyword: str) -> Dataset:
    """The item that holds a frame's transformation: in enhanced objects the frame's, or the shared, functional group."""
    for groups, place in (("PerFrameFunctionalGroupsSequence", max(frame, 0)), ("SharedFunctionalGroupsSequence", 0)):
        try:
            return header[groups].value[place][keyword].value[0]
        except Exception:  # absent, or too damaged to be told from absent
            continue
    return header


def _padding(header: Dataset, signed: bool) -> tuple[int, int] | None:
    first = number_of(header, "PixelPaddingValue")
    if first is None:
        return None
    last = number_of(header, "PixelPaddingRangeLimit")
    return _as_stored(first, signed), _as_stored(first if last is None else last, signed)


def _as_stored(value: float, signed: bool) -> int:
    # Written with the other signedness by many devices: the same 16 bits are meant.
    bits = int(value) & 0xFFFF
    return bits - 0x10000 if signed and bits > 0x7FFF else bits


def _modality(item: Dataset, signed: bool) -> Rescale | Lut:
    if "ModalityLUTSequence" in item:
        lut = _lut(item, "ModalityLUTSequence", signed)
        if lut is None:
            raise UnreadableImage("unusable modality LUT")
        return lut
    slope, intercept = number_of(item, "RescaleSlope"), number_of(item, "RescaleIntercept")
    given = [text_of(item, keyword) != "" for keyword in ("RescaleSlope", "RescaleIntercept")]
    if given != [slope is not None, intercept is not None] or slope == 0:
        raise UnreadableImage("unusable rescale slope or intercept")
    return Rescale(1.0 if slope is None else slope, 0.0 if intercept is None else intercept)


def _negative(modality: Rescale | Lut) -> bool:
    return isinstance(modality, Rescale) and (modality.intercept < 0 or modality.slope < 0)


def _window(item: Dataset, signed: bool) -> Window | Lut | None:
    lut = _lut(item, "VOILUTSequence", signed)
    if lut is not None:
        return lut
    center, width = number_of(item, "WindowCenter"), number_of(item, "WindowWidth")
    function = text_of(item, "VOILUTFunction") or "LINEAR"
    if center is None or width is None or function not in FUNCTIONS:
        return None
    return Window(function, center, width) if width >= 1 or (function != "LINEAR" and width > 0) else None


def _lut(item: Dataset, keyword: str, signed: bool) -> Lut | None:
    """The first item of a LUT sequence; None where there is none, or one that cannot be used."""
    try:
        lut = item[keyword].value[0]
        length, first, bits = (int(value) for value in lut.LUTDescriptor)
        data = lut.LUTData
    except Exception:
        return None
    length = length or 65536
    if isinstance(data, bytes):
        entries = np.frombuffer(data, "u1" if len(data) in (length, length + 1) and bits <= 8 else "<u2")
    else:
        entries = np.atleast_1d(np.asarray(data, dtype=np.int64)) & 0xFFFF
    if bits == 8 and len(entries) == (length + 1) // 2:  # two entries to a word
        entries = entries.astype("<u2").view(np.uint8)
    if not 8 <= bits <= 16 or len(entries) < length or length == 0:
        return None
    return Lut(_as_stored(first, signed), entries[:length].astype(np.float64), float(2**bits - 1))
