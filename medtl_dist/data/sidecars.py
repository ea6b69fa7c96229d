"""a sample's .json and .cls members ─► its label, group, domain and kept values; and its image ─► what it is.

Nothing here trusts the bytes: sizes are bounded by ``data/tars.py``, JSON is parsed strictly, an image's header is
checked before its pixels, and pixels are decoded both by the decoder of training and by one that minds a missing end.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from medtl_dist.data.images import is_grey
from medtl_dist.data.tars import TarSample
from medtl_dist.data.transforms import MAX_PIXELS, decode, image_size
from medtl_dist.errors import DataError

MAX_LABEL_CHARS = 200
SPLIT_FIELD = "split"


class BadSample(Exception):
    """A sample that cannot be used. Carries a reason free of names and values."""


@dataclass(frozen=True)
class Fields:
    """Where the facts of foreign samples are. ``label``: a field of .json, None for .cls; ``groups``: fields, or
    composites A+B of them, where ``split`` is the shard's split; ``domain``, ``keep``: fields."""

    label: str | None = None
    groups: tuple[str, ...] = ()
    domain: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """The fields that must occur in some sample."""
        parts = {part for option in self.groups for part in option.split("+")} - {SPLIT_FIELD}
        return parts | {name for name in (self.label, self.domain, *self.keep) if name}


class Told(NamedTuple):
    """What the texts of a sample tell. ``units``: per group option the values of its fields, None where one is
    empty."""

    label: str
    units: tuple[tuple[str, ...] | None, ...]
    domain: str | None
    kept: tuple[Any, ...]


class Look(NamedTuple):
    """An image as decoded. ``channels``: 1 or 3, of the file; ``grey``: no colour in it; ``remark``: what decoding
    takes away, or ""."""

    width: int
    height: int
    channels: int
    grey: bool
    remark: str


def read_told(sample: TarSample, split: str, fields: Fields) -> Told:
    """The facts of a foreign sample. Raises: BadSample, a text that is missing, damaged or of another kind."""
    values: dict[str, Any] = {}
    if fields.names:
        if "json" not in sample.texts:
            raise BadSample("a sample without a .json member, whose fields were asked for")
        values = parse_json(sample.texts["json"].data)
    label = _cls(sample) if fields.label is None else _text(values, fields.label)
    if not label:
        raise BadSample("an empty or missing label")
    if len(label) > MAX_LABEL_CHARS or not label.isprintable():
        raise BadSample(f"a label of more than {MAX_LABEL_CHARS} characters, or not printable")
    named = {SPLIT_FIELD: split}
    units = []
    for option in fields.groups:
        parts = tuple(named.get(part) or _text(values, part) for part in option.split("+"))
        units.append(parts if all(parts) else None)
    if units and not any(units):
        raise BadSample("no group (--group-field): fill it in, or give such samples a group of their own")
    domain = (_text(values, fields.domain) or None) if fields.domain else None
    return Told(label, tuple(units), domain, tuple(_kept(values, name) for name in fields.keep))


def parse_json(data: bytes) -> dict[str, Any]:
    """An object, parsed strictly. Raises: BadSample: no JSON object, NaN, a name twice, not UTF-8, nested too deep."""
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BadSample("a damaged .json member") from None
    if not isinstance(values, dict):
        raise BadSample("a .json member that holds no object")
    return values


def look_at(data: bytes, max_pixels: int = MAX_PIXELS) -> Look:
    """Decodes an image, twice: with training's decoder and with Pillow, which also minds a missing end.

    Raises: BadSample, no JPEG or PNG, too many pixels, damaged.
    """
    try:
        width, height = image_size(data)
        if width * height > max_pixels:
            raise DataError(f"{width} x {height} pixels are more than the limit of {max_pixels}")
        mode = _load_strictly(data)
        channels = 1 if mode in ("1", "L", "LA", "I", "F") or mode.startswith("I;16") else 3
        image = decode(data, channels, max_pixels)
    except DataError as error:
        raise BadSample(f"a bad image: {error}") from None
    remark = ""
    if data[24] == 16 and data[:4] == b"\x89PNG":
        remark = "16 bits a channel: only the upper 8 are used"
    elif mode in ("LA", "RGBA", "PA", "La", "RGBa"):
        remark = "an alpha channel, which is ignored"
    elif mode == "CMYK":
        remark = "CMYK, converted without a profile"
    return Look(image.shape[1], image.shape[0], channels, channels == 1 or is_grey(image), remark)


def _load_strictly(data: bytes) -> str:
    """Decodes with Pillow; returns the image's mode. Raises: DataError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; the limit of pixels is ours
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                mode = image.mode
                image.load()
        except Exception:  # damaged bytes make Pillow's decoders raise a dozen kinds of error
            raise DataError("the image can't be decoded, or not to its end") from None
    return mode


def _cls(sample: TarSample) -> str:
    if "cls" not in sample.texts:
        raise BadSample("a sample without a .cls member; --label-field FIELD reads labels from .json")
    try:
        return sample.texts["cls"].data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadSample("a .cls member that is not UTF-8 text") from None


def _text(values: dict[str, Any], name: str) -> str:
    """A field as stripped text, "" where missing or null; whole floats (12.0) as integers, as packing has it."""
    value = values.get(name)
    if isinstance(value, float):
        return str(int(value) if value.is_integer() else value)
    return "" if value is None else str(_scalar(value, name)).strip()


def _kept(values: dict[str, Any], name: str) -> Any:
    value = _scalar(values.get(name), name)
    return (value.strip() or None) if isinstance(value, str) else value


def _scalar(value: Any, name: str) -> Any:
    if isinstance(value, (list, dict)):
        raise BadSample(f"field {name!r} of its .json holds a list or an object: text or a number expected")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name twice")
    if any(isinstance(value, float) and not math.isfinite(value) for value in values.values()):
        raise ValueError("a number beyond double precision")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(name)
