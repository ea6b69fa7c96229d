"""entries ─► what the network sees: a raw file goes through packing's own steps and the evaluation view, all in one.

A raw image is read, shrunk, converted and encoded by the function that packs (``encoding.store``), and decoded and framed
by those that read shards, so that its pixels are those of the same image in a set, bit for bit. No torch in here.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise, tee
from typing import Any, NamedTuple

from medtl_dist.data.dicom_window import Rendering, rendering_from
from medtl_dist.data.encoding import Failure, Picture, Recipe, Workers, store
from medtl_dist.data.images import Encoding
from medtl_dist.data.inputs import Inputs, picture_of, read_entries, shown_name
from medtl_dist.data.partition import Span
from medtl_dist.data.pieces import DIFFERS, Reader
from medtl_dist.data.plan import Piece
from medtl_dist.data.shards import Dataset, read_shard_rows
from medtl_dist.data.tars import MAX_IMAGE_BYTES
from medtl_dist.data.transforms import EvalTransform, Image, decode
from medtl_dist.errors import DataError

_READ_AT_ONCE = 128  # samples of a shard
_PER_TASK = 8


@dataclass(frozen=True)
class Eye:
    """How an image becomes uint8 [channels, S, S]. ``recipe``: how it is stored first; None: kept as it was found."""

    recipe: Recipe | None
    transform: EvalTransform
    channels: int


class Seen(NamedTuple):
    """One image: its identity as columns, and its pixels, or why it has none (``refused``: on purpose)."""

    identity: dict[str, Any]
    image: Image | Failure
    refused: bool = False


class _Packed(NamedTuple):
    data: bytes
    sha256: bytes


def rendering_of(preprocessing: Mapping[str, Any]) -> Rendering | None:
    """How the training images were made from DICOM; None: they were image files."""
    window = preprocessing["pack"].get("window")
    return None if window is None else rendering_from(window)


def eye_of(preprocessing: Mapping[str, Any], rendering: Rendering | None) -> Eye:
    """What a checkpoint's preprocessing (``train.setup.preprocessing_of``) asks for. ``rendering``: of DICOM inputs, None
    where the inputs are image files."""
    pack, channels = preprocessing["pack"], preprocessing["channels"]
    known: dict[str | None, Encoding] = {"jpeg95": "jpeg95", "png": "png"}
    encoding = known.get(pack.get("encoding"))
    recipe = None
    if encoding is not None or rendering is not None:
        recipe = Recipe(pack["image_size_px"], channels, False, encoding or "png", rendering=rendering)
    return Eye(recipe, EvalTransform(preprocessing["image_size_px"], preprocessing["eval_view"]), channels)


def see(item: Picture | _Packed, eye: Eye) -> Image | Failure:
    """uint8 [channels, S, S] of one image, or why not. Never raises for a bad image."""
    try:
        if isinstance(item, _Packed):
            if hashlib.sha256(item.data).digest() != item.sha256:
                return Failure(DIFFERS)
            data = item.data
        elif eye.recipe is None and item.row < 0:
            data = _whole_file(item.file)
        else:
            recipe = eye.recipe or Recipe(None, eye.channels, False, "png")
            stored = store(item, recipe)
            if not hasattr(stored, "data"):
                return Failure(getattr(stored, "reason", "not grey"))
            data = stored.data  # type: ignore[union-attr]
        return eye.transform(decode(data, eye.channels))
    except DataError as error:
        return Failure(error.message)


def seen_part(inputs: Inputs, number: int, eye: Eye, workers: Workers) -> Iterator[Seen]:
    """Every entry of a part, each once, in order; decoded by ``workers``, a bounded number ahead.

    Raises: DataError, the listing or a shard can't be read; Interrupted, the store or a worker process is gone.
    """
    if inputs.dataset is not None:
        return _of_shards(inputs.dataset, inputs.spans[number], eye, workers)
    return _of_files(inputs, number, eye, workers)


def seen_split(dataset: Dataset, split: str, eye: Eye, workers: Workers) -> Iterator[Seen]:
    """Every image of a split in index order. Raises: as ``seen_part``."""
    total = sum(shard.samples for shard in dataset.shards(split))
    return _of_shards(dataset, Span(dataset.splits.index(split), 0, total), eye, workers)


def _of_files(inputs: Inputs, number: int, eye: Eye, workers: Workers) -> Iterator[Seen]:
    entries = read_entries(inputs, number)
    pictures = (picture_of(inputs, entry) for entry in entries if not (entry.refused or entry.bad))
    with contextlib.closing(workers.ordered(partial(_see_all, eye=eye), pictures, _PER_TASK)) as images:
        for entry in entries:
            identity = {"file": shown_name(entry.file), "row": None if entry.row < 0 else entry.row}
            if inputs.grouped:
                identity["group"] = entry.group or None
            reason = entry.refused or entry.bad
            yield Seen(identity, Failure(reason) if reason else next(images), entry.refused is not None)


def _of_shards(dataset: Dataset, span: Span, eye: Eye, workers: Workers) -> Iterator[Seen]:
    split = dataset.splits[span.source]
    mine, ahead = tee(_packed(dataset, split, span))
    items = (packed for _, packed in ahead)
    with contextlib.closing(workers.ordered(partial(_see_all, eye=eye), items, _PER_TASK)) as images:
        for (identity, _), image in zip(mine, images, strict=True):
            yield Seen(identity, image)


def _packed(dataset: Dataset, split: str, span: Span) -> Iterator[tuple[dict[str, Any], _Packed]]:
    shards = dataset.shards(split)
    pieces = list(_pieces([shard.samples for shard in shards], span))
    grouped = dataset.group_source != "none"
    groups: list[str | None] = []
    last = -1
    with contextlib.closing(Reader(dataset, split)) as reader:
        for piece, following in pairwise(chain(pieces, [None])):
            assert piece is not None
            if following is not None:
                reader.read_ahead(following)
            if grouped and piece.shard != last:
                groups = read_shard_rows(dataset, shards[piece.shard], ["group"]).column("group").to_pylist()
                last = piece.shard
            for row, sample in enumerate(reader.read(piece), piece.start):
                identity: dict[str, Any] = {"split": split, "key": sample.key.hex()}
                if grouped:
                    identity["group"] = groups[row]
                yield identity, _Packed(bytes(sample.data), sample.sha256)


def _pieces(counts: Sequence[int], span: Span) -> Iterator[Piece]:
    """The span's samples as ranges of shards, in order."""
    first = 0
    for shard, count in enumerate(counts):
        start, stop = max(span.start - first, 0), min(span.stop - first, count)
        for begin in range(start, stop, _READ_AT_ONCE):
            yield Piece(shard, begin, min(begin + _READ_AT_ONCE, stop))
        first += count


def _see_all(items: Sequence[Picture | _Packed], eye: Eye) -> list[Image | Failure]:
    return [see(item, eye) for item in items]


def _whole_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except FileNotFoundError:
        raise DataError("missing file") from None
    except OSError:
        raise DataError("file cannot be opened") from None
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"more than {MAX_IMAGE_BYTES / 2**20:.0f} MiB")
    return data
