"""manifest ─► stored images: one image per task in worker processes, results in the order asked for.

The window of unfinished tasks is bounded, and so is memory. Which worker does what never shows in the result.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.dicom import read_dicom
from medtl_dist.data.dicom_window import Rendering
from medtl_dist.data.images import (
    MAX_PIXELS,
    Encoding,
    UnreadableImage,
    encode,
    is_grey,
    read_image,
    shrink,
    to_channels,
)
from medtl_dist.data.processes import bounded_results, running_pool

# Below this many images the start of processes costs more than it saves.
_MIN_FOR_PROCESSES = 64


class Picture(NamedTuple):
    """Where the pixels of one image are: a file, or ``row`` of an array in an ``.npy`` file or of a DICOM file's frames
    (-1: no array, one frame)."""

    file: str
    row: int


@dataclass(frozen=True)
class Recipe:
    """How images are stored. ``channels`` 1 or 3; with ``only_grey`` an image in colour is a finding, not converted;
    ``rendering``: the files are DICOM, and this makes pixels of them."""

    image_size_px: int | None
    channels: int
    only_grey: bool
    encoding: Encoding
    max_pixels: int = MAX_PIXELS
    rendering: Rendering | None = None


class Stored(NamedTuple):
    """An encoded image: its bytes, their sha256 (32 bytes) and its shape."""

    data: bytes
    sha256: bytes
    width: int
    height: int
    channels: int


class Failure(NamedTuple):
    """An image that cannot be stored, and why."""

    reason: str


class Coloured(NamedTuple):
    """An image in colour where only grey was expected."""


class Look(NamedTuple):
    """What one image would be: its short side after shrinking, and whether it is grey."""

    short_side_px: int
    grey: bool


Result = Stored | Failure | Coloured


def store(picture: Picture, recipe: Recipe) -> Result:
    """Read, shrink, convert and encode one image. Never raises for a bad image: the result says why."""
    try:
        image = shrink(_pixels(picture, recipe), recipe.image_size_px)
        if recipe.only_grey and not is_grey(image):
            return Coloured()
        image = to_channels(image, recipe.channels)
        data = encode(image, recipe.encoding)
    except UnreadableImage as bad:
        return Failure(bad.reason)
    return Stored(data, hashlib.sha256(data).digest(), image.shape[1], image.shape[0], recipe.channels)


def look(picture: Picture, recipe: Recipe) -> Look | None:
    """Look at one image without storing it; None if it is unreadable."""
    try:
        image = shrink(_pixels(picture, recipe), recipe.image_size_px)
    except UnreadableImage:
        return None
    return Look(min(image.shape[:2]), is_grey(image))


def _pixels(picture: Picture, recipe: Recipe) -> NDArray[np.uint8]:
    if recipe.rendering is not None:
        return read_dicom(picture.file, picture.row, recipe.rendering, max_pixels=recipe.max_pixels)
    if picture.row < 0:
        return read_image(picture.file, image_size_px=recipe.image_size_px, max_pixels=recipe.max_pixels)
    return np.array(_array(picture.file)[picture.row])


@functools.lru_cache(maxsize=1)
def _array(file: str) -> NDArray[np.uint8]:
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _store_all(pictures: Sequence[Picture], recipe: Recipe) -> list[Result]:
    return [store(picture, recipe) for picture in pictures]


def _look_all(pictures: Sequence[Picture], recipe: Recipe) -> list[Look | None]:
    return [look(picture, recipe) for picture in pictures]


class Workers:
    """A pool for one pack: ``store`` and ``look`` over many images, in order, with a bounded window.

    One worker, or few images, means this process. Use ``open_workers``.
    """

    def __init__(self, pool: ProcessPoolExecutor | None, num_workers: int) -> None:
        self._pool = pool
        self._window = 4 * num_workers

    def store(self, pictures: Iterable[Picture], recipe: Recipe) -> Generator[Result]:
        # Whole images at native size can be large: fewer per task then, as results wait in memory for their turn.
        size = 8 if recipe.image_size_px is not None or recipe.encoding == "png" else 2
        return self.ordered(functools.partial(_store_all, recipe=recipe), pictures, size)

    def look(self, pictures: Iterable[Picture], recipe: Recipe) -> Generator[Look | None]:
        return self.ordered(functools.partial(_look_all, recipe=recipe), pictures, 8)

    def ordered(
        self, work: Callable[[Sequence[Any]], Sequence[Any]], items: Iterable[Any], size: int
    ) -> Generator[Any]:
        """The results of ``work``, which takes and returns ``size`` items at a time, in the order of the items."""
        if self._pool is None:
            for item in items:
                yield from work([item])
            return
        for results in bounded_results(self._pool, work, _chunks(items, size), self._window):
            yield from results


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@contextmanager
def open_workers(num_workers: int, num_images: int, at_least: int = _MIN_FOR_PROCESSES) -> Iterator[Workers]:
    """Start the processes, and end them whatever happens; none for fewer than ``at_least`` images."""
    if num_workers <= 1 or num_images < at_least:
        with _one_thread():
            yield Workers(None, 1)
        _array.cache_clear()  # else the mapped file would keep its disk space
        return
    with running_pool(num_workers) as pool:
        yield Workers(pool, num_workers)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
