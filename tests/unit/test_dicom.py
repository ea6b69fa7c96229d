"""DICOM files to pixels: every pixel format, every way to say the window, and nothing of a damaged file in an error."""

from __future__ import annotations

import logging
import re
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import dataset, ramp, save, sequence_item, write
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from medtl_dist.data.dicom import codestream_size, is_dicom, read_dicom
from medtl_dist.data.dicom_headers import Reading, examine
from medtl_dist.data.dicom_tags import grey_of
from medtl_dist.data.dicom_window import Rendering, parse_window
from medtl_dist.data.images import UnreadableImage

TAGS = Rendering("tags")


def reason(path: Path, frame: int = -1, rendering: Rendering = TAGS, **options: Any) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_dicom(path, frame, rendering, **options)
    assert caught.value.__cause__ is None
    return caught.value.reason


@pytest.mark.parametrize(
    ("dtype", "bits"), [("u1", 8), ("i1", 8), ("<u2", 9), ("<u2", 12), ("<u2", 16), ("<i2", 12), ("<i2", 16)]
)
def test_every_depth_and_sign_is_read(tmp_path: Path, dtype: str, bits: int) -> None:
    signed = np.dtype(dtype).kind == "i"
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    pixels = np.linspace(low, high, 32 * 24).round().astype(dtype).reshape(24, 32)
    path = write(tmp_path / "x", pixels, bits=bits)
    exact = (pixels.astype(float) - low) / (high - low) * 255
    shown = read_dicom(path, -1, parse_window(f"{low},{high}"))
    assert (shown.dtype, shown.shape) == (np.uint8, (24, 32))
    assert np.abs(shown - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("signed", [False, True])
def test_what_lies_above_the_stored_bits_is_no_pixel(tmp_path: Path, signed: bool) -> None:
    """Old devices keep overlays there."""
    pixels = (np.arange(24 * 32) - (300 if signed else 0)).reshape(24, 32)
    stored = (pixels & 0x0FFF) | np.where(np.arange(32) % 3 == 0, 0x5000, 0)
    path = write(tmp_path / "x", stored.astype("<i2" if signed else "<u2"), bits=12)
    shown = read_dicom(path, -1, parse_window("-300,467" if signed else "0,767"))
    assert np.abs(shown - (pixels - pixels.min()) / 767 * 255).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("signed", [False, True])
def test_padding_with_the_other_signedness_is_recognised(tmp_path: Path, signed: bool) -> None:
    pixels = np.full((8, 8), 100, "<i2" if signed else "<u2")
    pixels[:, 4:] = 200
    pixels[0] = -2000 if signed else 63536
    ds = dataset(pixels, PhotometricInterpretation="MONOCHROME1")
    ds.add_new("PixelPaddingValue", "US" if signed else "SS", 63536 if signed else -2000)
    save(ds, tmp_path / "x")
    shown = read_dicom(tmp_path / "x", -1, Rendering())
    assert shown[0].tolist() == [0] * 8
    assert shown[1].tolist() == [255] * 4 + [0] * 4


def test_a_padding_range_is_padding(tmp_path: Path) -> None:
    pixels = np.arange(100, dtype="<u2").reshape(10, 10) + 1
    path = write(tmp_path / "x", pixels, PixelPaddingValue=91, PixelPaddingRangeLimit=100)
    shown = read_dicom(path, -1, parse_window("0,100"))
    assert shown[9].max() == 0
    assert shown[8, 9] == 230


@pytest.mark.parametrize(
    ("photometric", "shape", "dark_first"),
    [
        ("MONOCHROME2", None, True),
        ("MONOCHROME1", None, False),
        ("MONOCHROME2", "IDENTITY", True),
        ("MONOCHROME1", "INVERSE", False),
        ("MONOCHROME1", "IDENTITY", True),
        ("MONOCHROME2", "INVERSE", False),
        ("MONOCHROME1", "OTHER", False),
    ],
)
def test_polarity(tmp_path: Path, photometric: str, shape: str | None, dark_first: bool) -> None:
    tags = {} if shape is None else {"PresentationLUTShape": shape}
    path = write(tmp_path / "x", ramp(0), bits=12, PhotometricInterpretation=photometric, **tags)
    shown = read_dicom(path, -1, Rendering())
    assert shown.reshape(-1)[ramp(0).argmin()] == (0 if dark_first else 255)
    assert shown.reshape(-1)[ramp(0).argmax()] == (255 if dark_first else 0)


@pytest.mark.parametrize(
    ("tags", "source"),
    [
        ({"WindowCenter": 500, "WindowWidth": 100}, "LINEAR"),
        ({"WindowCenter": [500, 40], "WindowWidth": [100, 9], "VOILUTFunction": "SIGMOID"}, "SIGMOID"),
        ({"WindowCenter": 500, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"}, "LINEAR_EXACT"),
        ({"WindowCenter": 500, "WindowWidth": 0.5}, "percentile"),
        ({"WindowCenter": 500, "WindowWidth": 0}, "percentile"),
        ({"WindowCenter": 500}, "percentile"),
        ({"WindowCenter": 500, "WindowWidth": 100, "VOILUTFunction": "CUBIC"}, "percentile"),
        ({}, "percentile"),
    ],
)
def test_the_first_usable_window_is_taken_and_named(tags: dict, source: str) -> None:
    ds = dataset(ramp(0), **tags)
    assert grey_of(ds, -1, TAGS)[1] == source
    assert grey_of(ds, -1, Rendering())[1] == "percentile"
    assert grey_of(ds, -1, parse_window("0,1"))[1] == "fixed"


@pytest.mark.parametrize(("tag", "text"), [("WindowCenter", b"5OO "), ("WindowWidth", b"nan ")])
def test_a_window_that_is_no_number_is_none(tmp_path: Path, tag: str, text: bytes) -> None:
    ds = dataset(ramp(0), WindowCenter="5000", WindowWidth="4000")
    save(ds, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data.replace(b"5000" if tag == "WindowCenter" else b"4000", text))
    assert np.array_equal(read_dicom(tmp_path / "x", -1, TAGS), read_dicom(tmp_path / "x", -1, Rendering()))


def test_a_rescale_that_is_no_number_makes_the_pixels_meaningless(tmp_path: Path) -> None:
    save(dataset(ramp(0), RescaleSlope="1.25", RescaleIntercept="0"), tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data.replace(b"1.25", b"Anna"))
    assert reason(tmp_path / "x") == "unusable rescale slope or intercept"


def test_enhanced_objects_say_it_per_frame(tmp_path: Path) -> None:
    pixels = np.stack([ramp(number) for number in range(3)])
    per_frame = [
        sequence_item(FrameVOILUTSequence=[sequence_item(WindowCenter=100 * n + 50, WindowWidth=100)]) for n in range(3)
    ]
    shared = sequence_item(PixelValueTransformationSequence=[sequence_item(RescaleSlope=2, RescaleIntercept=-7)])
    path = write(
        tmp_path / "x", pixels, NumberOfFrames=3,
        PerFrameFunctionalGroupsSequence=per_frame, SharedFunctionalGroupsSequence=[shared],
    )  # fmt: skip
    for frame in range(3):
        values = ramp(frame).astype(float) * 2 - 7
        exact = np.clip((values - (100 * frame + 49.5)) / 99 + 0.5, 0, 1) * 255
        assert np.abs(read_dicom(path, frame, TAGS) - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("compressed", [False, True])
def test_frames_are_read_one_by_one(tmp_path: Path, compressed: bool) -> None:
    pixels = np.stack([ramp(number) for number in range(4)])
    ds = dataset(pixels, NumberOfFrames=4)
    if compressed:
        ds.compress(RLELossless)
    save(ds, tmp_path / "x")
    for frame in range(4):
        alone = write(tmp_path / "alone", pixels[frame])
        assert np.array_equal(read_dicom(tmp_path / "x", frame, Rendering()), read_dicom(alone, -1, Rendering()))
    assert reason(tmp_path / "x", 4) == "no such frame"
    assert reason(tmp_path / "x", -1) == "several frames in one file"


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_lossless_compression_changes_nothing(tmp_path: Path, syntax: str) -> None:
    plain = write(tmp_path / "plain", ramp(3, (64, 96)), bits=12, WindowCenter=400, WindowWidth=600)
    ds = pydicom.dcmread(plain)
    ds.compress(syntax)
    save(ds, tmp_path / "small")
    assert np.array_equal(read_dicom(plain, -1, TAGS), read_dicom(tmp_path / "small", -1, TAGS))


def test_colour(tmp_path: Path) -> None:
    colours = np.zeros((8, 8, 3), np.uint8)
    colours[:4] = (200, 30, 90)
    path = write(tmp_path / "rgb", colours)
    assert np.array_equal(read_dicom(path, -1, Rendering()), colours)
    wide = write(tmp_path / "wide", colours.astype("<u2") * 16, bits=12)
    assert np.abs(read_dicom(wide, -1, Rendering()).astype(int) - colours * (255 / 255.9375)).max() <= 0.5
    ybr = np.zeros((8, 8, 3), np.uint8)
    ybr[...] = (81, 90, 240)  # red, ITU-R 601
    red = read_dicom(write(tmp_path / "ybr", ybr, PhotometricInterpretation="YBR_FULL"), -1, Rendering())
    assert np.abs(red[0, 0].astype(int) - (238, 14, 14)).max() <= 2

    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4
    ds = dataset(indices, PhotometricInterpretation="PALETTE COLOR")
    for name, values in (("Red", [0, 65535, 0, 0]), ("Green", [0, 0, 32896, 0]), ("Blue", [0, 0, 0, 65535])):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [4, 0, 16])
        ds[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        setattr(ds, f"{name}PaletteColorLookupTableData", np.array(values, "<u2").tobytes())
    save(ds, tmp_path / "palette")
    shown = read_dicom(tmp_path / "palette", -1, Rendering())
    assert shown[0, :4].tolist() == [[0, 0, 0], [255, 0, 0], [0, 128, 0], [0, 0, 255]]


@pytest.mark.parametrize("implicit", [False, True])
def test_files_older_than_the_header_are_read(tmp_path: Path, implicit: bool) -> None:
    ds = dataset(ramp(1), bits=12)
    plain = tmp_path / "plain"
    save(ds, plain)
    del ds.file_meta
    ds.save_as(tmp_path / "bare", implicit_vr=implicit, little_endian=True)
    assert (tmp_path / "bare").read_bytes()[128:132] != b"DICM"
    assert is_dicom(tmp_path / "bare")
    assert np.array_equal(read_dicom(tmp_path / "bare", -1, Rendering()), read_dicom(plain, -1, Rendering()))


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"\x08\x00", b"\x08\x00\x05\x00", b"\x02\x00\x00\x00UL\x04\x00"]))
def test_no_random_file_is_dicom(tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(start + data)
    if is_dicom(path):  # three elements in order, by chance: then the reader must still say no
        reason(path)
    for name, other in (
        ("t", b"file,label\n" * 40),
        ("p", b"\x89PNG\r\n\x1a\n" + data),
        ("z", bytes(500)),
        ("j", b"\xff\xd8"),
    ):
        path.with_name(name).write_bytes(other)
        assert not is_dicom(path.with_name(name))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    assert not is_dicom(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"Rows": 20_000, "Columns": 20_000}, "more than 100 Mpx"),
        ({"Rows": None}, "no image size in the DICOM header"),
        ({"Rows": 25}, "pixels that cannot be decoded (Explicit VR Little Endian)"),
        ({"NumberOfFrames": 2_000_000_000}, "more than 10000 frames"),
        ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, "pixels of other than 8 or 16 bits"),
        ({"BitsStored": 17}, "pixels of other than 8 or 16 bits"),
        ({"HighBit": 15}, "pixels that do not start at the lowest bit"),
        ({"PhotometricInterpretation": "ARGB"}, "unknown photometric interpretation"),
        ({"PhotometricInterpretation": "RGB"}, "pixels of another number of channels than the header's"),
        ({"PixelData": None}, "pixels that cannot be decoded (Explicit VR Little Endian)"),
        ({"RescaleSlope": 0}, "unusable rescale slope or intercept"),
        ({"ModalityLUTSequence": []}, "unusable modality LUT"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, tags: dict, expected: str) -> None:
    assert reason(write(tmp_path / "Doe", ramp(0), bits=12, **tags)) == expected


def test_the_limit_is_the_callers(tmp_path: Path) -> None:
    assert reason(write(tmp_path / "x", ramp(0)), max_pixels=500) == "more than 0.0005 Mpx"
    assert reason(tmp_path / "gone") == "missing file"


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless])
def test_a_truncated_file_is_unreadable_or_whole(tmp_path: Path, keep: float, syntax: str | None) -> None:
    ds = dataset(np.random.default_rng(0).integers(0, 4096, (64, 96)).astype("<u2"), bits=12)
    if syntax:
        ds.compress(syntax)
    save(ds, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "part").write_bytes(data[: int(len(data) * keep)])
    assert "0x" not in reason(tmp_path / "part")


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """One small image plain, RLE and JPEG 2000, with every kind of table and window."""
    folder = tmp_path_factory.mktemp("small")
    lut = sequence_item(LUTDescriptor=[4, 0, 16], LUTData=[0, 1, 2, 3], ModalityLUTType="US")
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "US", "US"
    files = []
    for syntax in (None, RLELossless, JPEG2000Lossless):
        ds = dataset(ramp(0, (64, 96)), bits=12, WindowCenter=[5, 6], WindowWidth=[7, 8], NumberOfFrames=1)
        ds.VOILUTSequence, ds.ModalityLUTSequence = [lut], [lut]
        ds.PixelPaddingValue = 3
        if syntax:
            ds.compress(syntax)
        save(ds, folder / "x")
        files.append((folder / "x").read_bytes())
    return files


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6), st.booleans()
)
def test_damage_anywhere_is_a_reason_or_an_image(
    small_files: list[bytes], which: int, damage: list[tuple[float, int]], early: bool
) -> None:
    """Bytes overwritten in the header, where ``early``, or anywhere: never another error, never a value in the reason."""
    data = bytearray(small_files[which])
    for where, value in damage:
        data[132 + int(where * ((1400 if early else len(data)) - 133))] = value
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        found = examine(file.name, "x", Reading(("PatientID", "KVP", "SOPInstanceUID"), TAGS, ()))
        assert found is None or len(found.frames) == len(found.windows)
        try:
            image = read_dicom(file.name, -1, TAGS)
        except UnreadableImage as bad:
            image, reason = np.zeros(0, np.uint8), bad.reason
        else:
            reason = "none"
    assert re.fullmatch(r"[A-Za-z0-9 ,.'()/#=-]+", reason)
    assert image.dtype == np.uint8
    assert image.size <= 3 * 100_000_000


def test_a_compressed_frame_of_another_size_is_not_decoded(tmp_path: Path) -> None:
    """A header of 64 by 96 pixels must not make a decoder allocate what the stream says."""
    ds = dataset(ramp(0, (64, 96)), bits=12)
    ds.compress(JPEG2000Lossless)
    save(ds, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    place = data.index(b"\xff\x4f\xff\x51") + 8
    assert struct.unpack_from(">2I", data, place) == (96, 64)
    (tmp_path / "x").write_bytes(data[:place] + struct.pack(">2I", 60_000, 60_000) + data[place + 8 :])
    assert reason(tmp_path / "x") == "compressed pixels of another size than the header's"


def test_sizes_of_streams() -> None:
    jpeg = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc4\x00\x02\xff\xc3\x00\x0b\x0c\x01\x02\x03\x04\x01\x00\x00\x00"
    assert codestream_size(jpeg) == (0x102, 0x304)
    assert codestream_size(b"\xff\xd8\xff\xff\xf7\x00\x0b\x0c\x00\x07\x00\x09\x01\x00") == (7, 9)
    assert codestream_size(b"") is None
    assert codestream_size(b"\xff\xd8" + b"\xff" * 40) is None
    assert codestream_size(b"\xff\xd8\xff\xe0\x00") is None


def test_a_deflated_file_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    ds = dataset(ramp(0))
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    save(ds, tmp_path / "x")
    assert reason(tmp_path / "x") == "deflated DICOM"


def test_nothing_is_said_by_the_library(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """pydicom warns of an unknown character set with its name, and logs a failing decoder; warnings are errors here."""
    caplog.set_level(logging.DEBUG)
    ds = dataset(ramp(0, (64, 96)), bits=12, SpecificCharacterSet="ISO_IR 192", PatientID="Zoë")
    ds.compress(JPEG2000Lossless)
    save(ds, tmp_path / "x")
    data = (tmp_path / "x").read_bytes().replace(b"ISO_IR 192", b"CANARY 192").replace("Zoë".encode(), b"CANA")
    caplog.clear()
    (tmp_path / "x").write_bytes(data)
    found = examine(tmp_path / "x", "x", Reading(("PatientID", "PatientName"), TAGS, ()))
    assert found is not None
    assert found.values == ("CANA", "")
    assert read_dicom(tmp_path / "x", -1, TAGS).shape == (64, 96)
    stream = data.index(b"\xff\x4f\xff\x51")
    (tmp_path / "x").write_bytes(data[: stream + 60] + b"CANARY" * 10 + data[stream + 120 :])
    assert reason(tmp_path / "x").startswith("pixels that cannot be decoded")
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == 0
