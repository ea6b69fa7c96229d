"""What ranks agree on: small values through ``torch.distributed`` where it is initialised, themselves where it is not.

Everything here moves CPU tensors, so a process group needs a CPU backend (gloo, or ``cpu:gloo,cuda:nccl``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from medtl_dist.errors import BY_NAME, MedtlError

T = TypeVar("T")


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def largest(value: int) -> int:
    """The largest of the ranks' integers."""
    if not active():
        return value
    tensor = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def totals(values: Iterable[float]) -> list[float]:
    """Sums over the ranks, position by position, in float64."""
    tensor = torch.tensor(list(values), dtype=torch.float64)
    if active():
        dist.all_reduce(tensor)
    return tensor.tolist()


def from_rank_0(value: T) -> T:
    """Rank 0's object on every rank (pickled between our own processes; keep it small)."""
    if not active():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_to_rank_0(value: T) -> list[T]:
    """The ranks' objects in rank order on rank 0; an empty list elsewhere."""
    if not active():
        return [value]
    box: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, box, dst=0)
    return box or []


def gather_to_all(value: T) -> list[T]:
    """The ranks' objects in rank order, on every rank."""
    if not active():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def raise_together(failure: MedtlError | None, *, failed: bool | None = None) -> None:
    """Raise on every rank the first rank's failure, so that no rank waits for one that has given up.

    Every rank calls this at the same place. ``failed``: the ranks' agreement where the caller already has it (a sum in
    a reduction of its own), which saves this function's reduction in the common case that nobody failed.
    """
    if failed is None:
        failed = largest(int(failure is not None)) > 0
    if not failed:
        return
    known = [f for f in gather_to_all((type(failure).__name__, failure.message) if failure else None) if f is not None]
    name, message = known[0]
    raise BY_NAME.get(name, MedtlError)(message)


def agreed(action: Callable[[], T]) -> T:
    """``action()`` on every rank, or the first rank's MedtlError on every rank."""
    failure: MedtlError | None = None
    value: T | None = None
    try:
        value = action()
    except MedtlError as error:
        failure = error
    raise_together(failure)
    return value  # type: ignore[return-value]
