"""DICOM file ─► uint8 pixels: one frame decoded by pydicom's plugins and rendered as its tags, or the set's policy, say.

A function of the file and of a ``Rendering`` (plain JSON in ``dataset.json`` and in checkpoints), so that ``predict`` on a
raw file does exactly what packing did. pydicom quotes values in its warnings, logs and errors; none of these leaves
this module: an unreadable file is an ``UnreadableImage`` with a reason of our own.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.dicom_tags import MAX_FRAMES, grey_of, num_frames, number_of, quiet, text_of
from medtl_dist.data.dicom_window import Rendering, render
from medtl_dist.data.images import MAX_PIXELS, UnreadableImage

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
_RLE = "1.2.840.10008.1.2.5"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_VRS = frozenset(b"AE AS CS DA DS DT FD FL IS LO LT OB OW PN SH SL SS ST TM UI UL UN US UT".split())


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
    from pydicom.filereader import read_file_meta_info

    magic = file.read(132).endswith(b"DICM")
    file.seek(0)
    try:
        # pydicom would inflate the whole of it, whatever its size.
        deflated = magic and text_of(read_file_meta_info(file.name), "TransferSyntaxUID") == _DEFLATED
    except Exception:
        raise UnreadableImage("damaged DICOM header") from None
    if deflated:
        raise UnreadableImage("deflated DICOM")
    try:
        return dcmread(file, stop_before_pixels=True, force=True)
    except Exception:  # damaged bytes raise a dozen kinds of error, whose texts quote them
        raise UnreadableImage("damaged DICOM header") from None


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
    """Look at compressed pixels before a decoder does: a stream that says another size than the header would be allocated,
    and one that is cut short would be filled up in silence by some decoders."""
    from pydicom.encaps import get_frame

    if not syntax.startswith(("1.2.840.10008.1.2.4.", _RLE)):
        return
    head = file.read(12)  # tag, VR, reserved, undefined length: implicit VR cannot be compressed
    if head[8:12] != b"\xff\xff\xff\xff" or not _whole_fragments(file):
        raise UnreadableImage("damaged or truncated pixel data")
    try:
        encoded = get_frame(file, max(frame, 0), number_of_frames=num_frames(header))
    except Exception:
        raise UnreadableImage("damaged or truncated pixel data") from None
    size = codestream_size(encoded)
    if size is None and syntax != _RLE:
        raise UnreadableImage("compressed pixels that name no size")
    if size is not None and size != (number_of(header, "Rows"), number_of(header, "Columns")):
        raise UnreadableImage("compressed pixels of another size than the header's")


def _whole_fragments(file: BinaryIO) -> bool:
    """Whether the items from here on end with the delimiter, or with the file; the file is left where it was."""
    start, end = file.tell(), os.fstat(file.fileno()).st_size
    try:
        while (place := file.tell()) < end:
            item, length = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
            if item == b"\xfe\xff\xdd\xe0":
                return True
            if item != b"\xfe\xff\x00\xe0" or place + 8 + length > end:
                return False
            file.seek(length, os.SEEK_CUR)
        return True
    finally:
        file.seek(start)


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
        # The RLE plugin in Rust is faster (0.03 s against 0.1 s for 3.8 Mpx), and prints a backtrace for damaged data.
        plugin = "pydicom" if syntax == _RLE else ""
        pixels = pixel_array(file, index=max(frame, 0), transfer_syntax_uid=syntax, decoding_plugin=plugin)
        if text_of(header, "PhotometricInterpretation") == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, header)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of a plugin written in Rust is no Exception
        raise UnreadableImage(f"pixels that cannot be decoded ({_syntax_name(syntax)})") from None
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
