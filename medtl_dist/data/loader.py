"""passes ─► filled slots: hands the parts of a pass to loader processes and joins what they make, in order.

Why not ``torch.utils.data.DataLoader``: loader processes here write into their own rows of one shared slot per batch,
so nothing is pickled, collated or sent but keys and labels; they need no torch (about 120 MiB each instead of 700); a
death is noticed at once and in any thread, also in Ray Train's; errors cross as themselves; no ``/dev/shm`` is used,
which containers keep small, and nothing is left behind however either side dies.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from medtl_dist.data.reader import Layout, Pass
from medtl_dist.data.worker import Failed, Part, Start, make_part, map_slots
from medtl_dist.errors import Interrupted, UserError

Images = npt.NDArray[np.uint8]

SLOTS_AHEAD = 4
_EXIT_S = 5.0
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Loader:
    """Makes batches ahead of their use: in a thread of this process (``num_workers = 0``, one batch ahead) or in
    processes that last until ``close``. One pass at a time: a new one ends the last. What a batch holds does not
    depend on ``num_workers``.

    Raises: UserError, a negative number of workers.
    """

    def __init__(self, num_workers: int = 0) -> None:
        if num_workers < 0:
            raise UserError(f"data.loader_workers = {num_workers} is impossible: give 0 (no processes) or more")
        self.num_workers = num_workers
        self._processes: list[_Process] = []
        self._memory: list[int] = []  # a file descriptor, once there are processes
        self._pass = 0
        weakref.finalize(self, _stop, self._processes, self._memory)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the loader processes and waits for them; the next pass starts new ones."""
        self._pass += 1
        _stop(self._processes, self._memory)

    @property
    def process_ids(self) -> list[int]:
        """The ids of the running loader processes."""
        return [process.popen.pid for process in self._processes]

    def run(self, work: Pass) -> Iterator[tuple[Images, list[Part]]]:
        """The pass's batches in order: uint8 [rows, C, S, S], valid until the next is asked for, and its parts.

        Raises:
            DataError: a shard is missing or damaged (see ``Reader.read`` and ``fill``).
            Interrupted: a loader process was killed.
            UserError: more ranks than lanes, fewer samples than a batch, no such split.
        """
        layout = work.layout(max(1, self.num_workers))
        self._pass += 1
        if self.num_workers == 0:
            return self._run_here(work, layout)
        return self._run_in_processes(work, layout)

    def _run_here(self, work: Pass, layout: Layout) -> Iterator[tuple[Images, list[Part]]]:
        cv2.setNumThreads(0)  # one thread decodes; OpenCV's own would only fight those of the model
        parts = work.parts(0, 1)

        def make() -> tuple[Images, list[Part]]:
            images = np.empty(_shape(work, layout), np.uint8)
            return images, [make_part(next(parts), images, work)]

        with ThreadPoolExecutor(1, thread_name_prefix="medtl-loader") as thread:
            ahead = thread.submit(make) if layout.num_batches else None
            for batch in range(layout.num_batches):
                assert ahead is not None
                made = ahead.result()
                ahead = thread.submit(make) if batch + 1 < layout.num_batches else None
                yield made

    def _run_in_processes(self, work: Pass, layout: Layout) -> Iterator[tuple[Images, list[Part]]]:
        if layout.num_batches == 0:
            return
        this_pass = self._pass
        try:
            self._settle()
            num_slots = SLOTS_AHEAD if layout.together else max(SLOTS_AHEAD, 2 * len(layout.slices))
            slots = self._start(work, layout, num_slots)
            asked = 0
            for batch in range(layout.num_batches):
                if self._pass != this_pass:
                    raise RuntimeError("this pass ended when another began on the same loader")
                # The slot of the batch before is free now that the consumer is back; ask for as many as there are.
                while asked < min(batch + num_slots, layout.num_batches):
                    for worker in layout.makers(asked):
                        self._processes[worker].ask(asked % num_slots)
                    asked += 1
                parts = [self._processes[worker].answer() for worker in layout.makers(batch)]
                yield slots[batch % num_slots], parts
        except (Exception, KeyboardInterrupt):
            if self._pass == this_pass:
                self.close()
            raise

    def _settle(self) -> None:
        """Takes the answers that an abandoned pass has left, so that nobody writes into its slots any more."""
        for process in self._processes:
            process.settle()

    def _start(self, work: Pass, layout: Layout, num_slots: int) -> npt.NDArray[np.uint8]:
        """Shared memory for the slots, and the pass told to the processes (started where they are not running)."""
        shape = (num_slots, *_shape(work, layout))
        if not self._memory:
            self._memory.append(_anonymous_memory())
        memory = self._memory[0]
        size = int(np.prod(shape))
        if os.fstat(memory).st_size < size:
            os.ftruncate(memory, size)
        num_workers = len(layout.slices)  # a small pass needs fewer than there may be
        while len(self._processes) < num_workers:
            self._processes.append(_Process(memory))
        for worker, rows in enumerate(layout.slices):
            self._processes[worker].tell(Start(work, worker, num_workers, rows, shape))
        return map_slots(memory, shape)


class _Process:
    """One loader process and what it still owes."""

    def __init__(self, memory: int) -> None:
        self.connection, theirs = Pipe()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        code = "from medtl_dist.data.worker import main; main()"
        # A new interpreter rather than a fork (unsafe beside threads and CUDA) or multiprocessing's spawn, which
        # imports the main script again: in a Ray worker that is all of Ray. -P: the folder we are in is no module path.
        self.popen = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(theirs.fileno()), str(memory)],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), memory),
            env={**os.environ, **_ONE_THREAD, "PYTHONPATH": paths},
        )
        theirs.close()
        self.owed = 0

    def tell(self, start: Start) -> None:
        self._guarded(self.connection.send, start)

    def ask(self, slot: int) -> None:
        self._guarded(self.connection.send, slot)
        self.owed += 1

    def answer(self) -> Part:
        answer = self._guarded(self.connection.recv)
        self.owed -= 1
        if isinstance(answer, Failed):
            if answer.error is not None:
                raise answer.error
            raise RuntimeError(f"a loader process failed:\n{answer.traceback}")
        return answer

    def settle(self) -> None:
        while self.owed:
            self._guarded(self.connection.recv)
            self.owed -= 1

    def _guarded(self, act: Callable[..., Any], *args: object) -> Any:
        try:
            return act(*args)
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(_EXIT_S)
            code = self.popen.returncode
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            raise Interrupted(
                f"loader process {self.popen.pid} {how}; if memory ran out, lower data.loader_workers or "
                "data.global_batch_size; run the same command with --resume to go on"
            ) from None


def _stop(processes: list[_Process], memory: list[int]) -> None:
    """Closes the connections, which ends the processes, and waits; kills one that does not end. Empties both lists."""
    for process in processes:
        process.connection.close()
    for process in processes:
        try:
            process.popen.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.popen.wait()
    processes.clear()
    while memory:
        os.close(memory.pop())


def _shape(work: Pass, layout: Layout) -> tuple[int, int, int, int]:
    size = work.transform.image_size_px
    return layout.num_rows, work.dataset.channels, size, size


def _anonymous_memory() -> int:
    """A file descriptor of memory without a name: gone when the last process that has it is gone."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("medtl-loader", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
