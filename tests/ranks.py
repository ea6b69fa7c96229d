"""Several ranks on this machine: a function run in processes of their own that share a gloo group.

They are forked from a process that has done nothing but import: importing torch anew in every rank took longer than most of what
the ranks do. Its only other threads are OpenBLAS's and jemalloc's, which are prepared for a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

_IMPORTED = ["torch", "torchvision.models", "pyarrow.parquet", "medtl_dist.train.loop"]


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 240) -> list[Any]:
    """``function(rank, world_size, *arguments)`` on every rank of a gloo group; the results in rank order.

    ``function`` is a module's own. A rank that fails fails the test with that rank's traceback, and nothing outlives it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        processes = [
            context.Process(
                target=_work,
                args=(rank, world_size, str(store), results, function, arguments, dict(os.environ)),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            received: dict[int, Any] = {}
            while len(received) < world_size:
                try:
                    rank, error, value = results.get(timeout=timeout_s)
                except queue.Empty:
                    raise AssertionError(f"ranks {set(range(world_size)) - set(received)} gave no answer") from None
                if error is not None:
                    raise AssertionError(f"rank {rank} failed:\n{error}")
                received[rank] = value
            for process in processes:
                process.join(timeout=30)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
                process.close()
            results.close()
            results.join_thread()
    return [received[rank] for rank in range(world_size)]


def _work(
    rank: int,
    world_size: int,
    store: str,
    results: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    os.environ.clear()  # the importing process has kept what the first test's was
    os.environ.update(environment, LOCAL_WORLD_SIZE=str(world_size))
    warnings.simplefilter("error")  # as in pytest's own process
    error = value = None
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
        )
        value = function(rank, world_size, *arguments)
        dist.destroy_process_group()
    except BaseException:
        error = traceback.format_exc()
    results.put((rank, error, value))
