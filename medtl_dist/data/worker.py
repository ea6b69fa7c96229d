"""The loader process, on two inherited file descriptors: a connection, and memory shared with the process that asks.

Told a pass, then asked for part after part, it puts pixels into the slot named and answers with keys and labels. It
knows nothing of torch, so it starts fast and stays small; it ends when the process that asked is gone.
"""

from __future__ import annotations

import contextlib
import mmap
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from medtl_dist.data.reader import Pass, Sample, fill
from medtl_dist.errors import MedtlError
from medtl_dist.storage import leave


@dataclass(frozen=True)
class Start:
    """Begin a pass: this process is ``worker`` of ``num_workers`` and fills ``rows`` of each slot.
    ``shape``: slots, rows, channels, height, width of the shared memory."""

    work: Pass
    worker: int
    num_workers: int
    rows: slice
    shape: tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Part:
    """What is told about samples besides their pixels."""

    labels: list[int | list[int]]
    keys: list[str]


@dataclass(frozen=True)
class Failed:
    """The error that ended the pass: one of ours as itself, anything else (a bug) as its traceback."""

    error: MedtlError | None
    traceback: str


def make_part(samples: list[Sample], rows: npt.NDArray[np.uint8], work: Pass) -> Part:
    """Fills ``rows`` (uint8 [≥ n, C, S, S]) with the samples' pixels, 0 beyond them, and tells the rest.

    Raises: DataError, see ``fill``.
    """
    fill(rows, samples, work)
    return Part([sample.label for sample in samples], [sample.key.hex() for sample in samples])


def serve(connection: Connection, memory: int) -> None:
    """Answers requests (the number of a slot each) until the other end closes."""
    start = connection.recv()
    while True:
        slots = map_slots(memory, start.shape)
        parts = start.work.parts(start.worker, start.num_workers)
        while not isinstance(message := connection.recv(), Start):
            try:
                answer = make_part(next(parts), slots[message, start.rows], start.work)
            except Exception as error:
                answer = Failed(error if isinstance(error, MedtlError) else None, traceback.format_exc())
            connection.send(answer)
        start = message


def map_slots(memory: int, shape: tuple[int, int, int, int, int]) -> npt.NDArray[np.uint8]:
    """uint8 [slots, rows, C, S, S] over the shared memory behind a file descriptor."""
    size = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(memory, size), np.uint8).reshape(shape)


def main() -> None:
    """Serves until the other end closes (arguments: the two descriptors); Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    pa.set_cpu_count(1)
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(connection, int(sys.argv[2]))
    leave(0)
