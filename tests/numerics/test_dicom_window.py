"""Grey levels against the standard's pseudo-code written out pixel by pixel, against pydicom, and against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dicom_files import dataset, sequence_item
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from medtl_dist.data.dicom_tags import grey_of
from medtl_dist.data.dicom_window import (
    Grey,
    Lut,
    Percentiles,
    Range,
    Rendering,
    Rescale,
    Window,
    chosen_frames,
    parse_window,
    percentile_range,
    render,
    rendering_from,
)
from medtl_dist.errors import UserError

IDENTITY = Rescale(1.0, 0.0)
EVERY_VALUE = np.arange(-2048, 4096, dtype=np.int16).reshape(64, 96)


def by_the_book(x: float, function: str, c: float, w: float) -> float:  # noqa: PLR0911
    """PS3.3 C.11.2.1.2 and C.11.2.1.3 with y from 0 to 1, as its pseudo-code says."""
    if function == "LINEAR":
        if x <= c - 0.5 - (w - 1) / 2:
            return 0.0
        if x > c - 0.5 + (w - 1) / 2:
            return 1.0
        return (x - (c - 0.5)) / (w - 1) + 0.5
    if function == "LINEAR_EXACT":
        if x <= c - w / 2:
            return 0.0
        if x > c + w / 2:
            return 1.0
        return (x - c) / w + 0.5
    try:
        return 1 / (1 + math.exp(-4 * (x - c) / w))
    except OverflowError:
        return 0.0


@settings(max_examples=40, deadline=None)
@given(
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    center=st.floats(-1500, 3000).map(lambda value: round(value * 4) / 4),
    width=st.integers(1, 5000) | st.sampled_from([1.5, 2.5, 400.5]),
    slope=st.sampled_from([1.0, 2.0, 0.25, -1.0]),
    intercept=st.sampled_from([0.0, -1024.0, 0.5]),
    invert=st.booleans(),
)
def test_window_functions_are_the_standards(
    function: str, center: float, width: float, slope: float, intercept: float, invert: bool
) -> None:
    shown = render(EVERY_VALUE, Grey(None, Rescale(slope, intercept), Window(function, center, width), invert))
    for stored, got in zip(EVERY_VALUE.reshape(-1)[::13].tolist(), shown.reshape(-1)[::13].tolist(), strict=True):
        y = by_the_book(stored * slope + intercept, function, center, width)
        exact = 255 * (1 - y if invert else y)
        # Where the exact value lies between two integers, to the last bit, either is right.
        assert abs(got - exact) <= 0.5 + 1e-9, (stored, got, exact)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(40, 400), (600, 1), (127.5, 255), (-600, 1500)])
def test_windows_agree_with_pydicom(function: str, center: float, width: float) -> None:
    tags = {"WindowCenter": [center, 1], "WindowWidth": [width, 7], "VOILUTFunction": function}
    ds = dataset(EVERY_VALUE, bits=16, RescaleSlope=2, RescaleIntercept=-1024, **tags)
    grey, source = grey_of(ds, -1, Rendering("tags"))
    assert source == function
    with np.errstate(over="ignore"):
        theirs = apply_voi_lut(apply_modality_lut(EVERY_VALUE, ds), ds)
    # pydicom's output runs over the range of the rescaled values: y = 2 * stored - 1024 of 16 signed bits.
    low, high = -(2**15) * 2 - 1024, (2**15 - 1) * 2 - 1024
    expected = (theirs - low) / (high - low) * 255
    assert np.abs(render(EVERY_VALUE, grey) - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(("first", "bits"), [(0, 8), (100, 12), (65436, 16)])
def test_voi_luts_agree_with_pydicom(first: int, bits: int) -> None:
    """The first item counts, the ends are clamped, and a first value of 65436 means -100 where pixels are signed."""
    length = 250 if bits == 8 else 300  # pydicom indexes a table of 8 bits with 8 bits
    entries = (np.linspace(0, 1, length) ** 2 * (2**bits - 1)).astype(np.uint16)
    item = sequence_item(LUTDescriptor=[length, first, bits], LUTData=entries.tobytes())
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    other = sequence_item(LUTDescriptor=[2, 0, 8], LUTData=[0, 1])
    signed = first > 32767
    pixels = EVERY_VALUE if signed else np.abs(EVERY_VALUE).astype(np.uint16) % (256 if bits == 8 else 65535)
    ds = dataset(pixels, VOILUTSequence=[item, other], WindowCenter=5, WindowWidth=3)
    grey, source = grey_of(ds, -1, Rendering("tags"))
    assert source == "VOI LUT"
    shown = render(pixels, grey)
    if not signed:  # pydicom takes 65436 as it stands
        expected = apply_voi_lut(pixels, ds) / (2**bits - 1) * 255
        assert np.abs(shown - expected).max() <= 0.5 + 1e-9
    start = first - 65536 if signed else first
    at = {int(value): int(out) for value, out in zip(pixels.reshape(-1), shown.reshape(-1), strict=True)}
    assert (at[start], at[start + length - 1], at[max(at)]) == (0, 255, 255)
    assert at[start + 150] == round(int(entries[150]) / (2**bits - 1) * 255)


def test_eight_bit_entries_may_be_packed_or_not() -> None:
    entries = np.linspace(0, 255, 256).astype(np.uint8)[::-1]
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    packed = entries.tobytes()
    for data, vr in (
        (packed, "OW"),
        (entries.astype("<u2").tobytes(), "OW"),
        (np.frombuffer(packed, "<u2").tolist(), "US"),
    ):
        item = sequence_item(LUTDescriptor=[256, 0, 8], LUTData=data)
        item["LUTDescriptor"].VR, item["LUTData"].VR = "US", vr
        grey, _ = grey_of(dataset(pixels, VOILUTSequence=[item]), -1, Rendering("tags"))
        assert np.array_equal(render(pixels, grey), 255 - pixels)


def test_modality_luts_agree_with_pydicom() -> None:
    entries = np.arange(500, dtype=np.uint16)[::-1] * 3
    item = sequence_item(LUTDescriptor=[500, 64, 16], LUTData=entries.tobytes(), ModalityLUTType="OD")
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    pixels = np.arange(1024, dtype=np.uint16).reshape(32, 32)
    ds = dataset(pixels, bits=10, ModalityLUTSequence=[item], RescaleSlope=5)
    grey, _ = grey_of(ds, -1, parse_window("0,1500"))
    assert isinstance(grey.modality, Lut)
    assert np.array_equal(grey.modality(pixels.astype(float)), apply_modality_lut(pixels, ds))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-500, 500), min_size=1, max_size=60),
    st.tuples(st.floats(0, 50), st.floats(50, 100)),
    st.sampled_from([1.0, -2.0, 0.5]),
)
def test_percentiles_agree_with_numpy(pixels: list[int], percentiles: tuple[float, float], slope: float) -> None:
    stored, counts = np.unique(pixels, return_counts=True)
    found = percentile_range(stored * slope, counts, Percentiles(*percentiles))
    assert np.allclose(found, np.percentile(np.array(pixels) * slope, percentiles), rtol=0, atol=1e-9)


def test_a_fixed_range_is_linear_and_clipped() -> None:
    stored = np.array([[-2000, -1000, -300, 400, 3000]], np.int16)
    shown = render(stored, Grey(None, IDENTITY, Range(-1000, 400), invert=False))
    assert shown.tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize("padding", [(5000, 5000), (4990, 5000), (5000, 4990)])
@pytest.mark.parametrize("invert", [False, True])
def test_padding_is_black_and_has_no_say_in_the_percentiles(padding: tuple[int, int], invert: bool) -> None:
    body = np.arange(1000, 2000, dtype=np.uint16)
    window = Percentiles(0.5, 99.5)
    alone = render(body[None], Grey(None, IDENTITY, window, invert))
    padded = np.concatenate([np.full(3000, 5000, np.uint16), body])[None]
    shown = render(padded, Grey(padding, IDENTITY, window, invert))
    assert shown[0, :3000].tolist() == [0] * 3000
    assert np.array_equal(shown[:, 3000:], alone)
    assert (alone[0, 0], alone[0, -1]) == ((255, 0) if invert else (0, 255))


def test_padding_is_recognised_before_rescaling() -> None:
    stored = np.array([[0, 100, 200]], np.uint16)
    grey = Grey((0, 0), Rescale(1, 100), Range(100, 300), invert=True)
    assert render(stored, grey).tolist() == [[0, 128, 0]]  # 0 is padding, though rescaled it is 100: white inverted


@pytest.mark.parametrize("value", [0, 7, 4095])
def test_an_image_of_one_value_is_black(value: int) -> None:
    stored = np.full((4, 4), value, np.uint16)
    assert render(stored, Grey(None, IDENTITY, Percentiles(0.5, 99.5), invert=False)).max() == 0
    assert render(stored, Grey((value, value), IDENTITY, Percentiles(0.5, 99.5), invert=True)).max() == 0


@pytest.mark.parametrize("text", ["tags", "percentile", "-1000,400", "0.5,1.25"])
def test_a_rendering_survives_json(text: str) -> None:
    rendering = parse_window(text, "middle")
    assert rendering_from(rendering.as_json()) == rendering


@pytest.mark.parametrize("text", ["auto", "400,-1000", "1,1", "1", "1,2,3", "nan,4", "-inf,0", ""])
def test_windows_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="tags, percentile, or LO,HI"):
        parse_window(text)


def test_frames_are_chosen_as_asked() -> None:
    assert [chosen_frames(policy, 1) for policy in ("single", "first", "middle", "all")] == [[-1]] * 4
    assert [chosen_frames(policy, 5) for policy in ("single", "first", "middle", "all")] == [
        [],
        [0],
        [2],
        [0, 1, 2, 3, 4],
    ]
    with pytest.raises(UserError, match="--frames last"):
        Rendering(frames="last")
