"""inputs ─► parts: which part of an output holds which images, as arithmetic on counts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medtl_dist.errors import UserError


@dataclass(frozen=True)
class Span:
    """Images ``[start, stop)`` of the source at position ``source``."""

    source: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def parts_of(counts: Sequence[int], part_size: int) -> list[Span]:
    """The sources cut into spans of ``part_size`` images, the last of a source shorter: in order, each image in one part.

    Part n is the same whoever asks, and whatever has been made of the others. Raises: UserError, a part of no images.
    """
    if part_size < 1:
        raise UserError(f"--part-size {part_size}: at least 1 image expected")
    return [
        Span(source, start, min(start + part_size, count))
        for source, count in enumerate(counts)
        for start in range(0, count, part_size)
    ]


def whole_batches(part_size: int, batch_size: int) -> int:
    """The part size that is asked for, rounded up to whole batches, so that no batch but the last is padded."""
    return max(1, -(-part_size // batch_size)) * batch_size
