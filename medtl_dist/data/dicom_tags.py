"""DICOM header ─► what turns a frame's stored values into pixels: the tags of padding, modality, window and polarity.

What a header holds may be damaged, foreign or another's idea of the standard; what cannot be used counts as absent where the
standard makes it optional, and makes the image unreadable where pixels would be wrong without it.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from medtl_dist.data.dicom_window import FUNCTIONS, Grey, Lut, Percentiles, Range, Rendering, Rescale, Window
from medtl_dist.data.images import UnreadableImage
from medtl_dist.errors import UserError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
# More frames than any device makes: a header that claims them is damaged, or meant to fill our memory.
MAX_FRAMES = 10_000


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
