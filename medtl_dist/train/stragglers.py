"""ranks' own times of an epoch → the ranks that hold the others up, by rank and host."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medtl_dist import collectives

if TYPE_CHECKING:
    from medtl_dist.train.clock import Clock
    from medtl_dist.train.session import Session

SLOW = 1.5  # times the median of the other ranks
COSTS = 0.05  # of a step's time: a rank that loses less is not worth a name


@dataclass(frozen=True)
class OwnTime:
    """What a rank spends a step on work of its own: waiting for its data, and the forward pass.

    DDP exchanges gradients within the backward pass, and before each step ranks agree: a slow rank shows there as the
    *others'* waiting, so neither counts. The backward pass is taken to be as slow as the forward one.
    """

    rank: int
    host: str
    data_wait_s: float
    forward_s: float

    @property
    def total_s(self) -> float:
        return self.data_wait_s + self.forward_s


def own_time(rank: int, clock: Clock) -> OwnTime:
    steps = max(clock.num_steps, 1)
    return OwnTime(rank, platform.node(), clock.seconds["data_wait"] / steps, clock.forward.total() / steps)


def slowness(times: Sequence[OwnTime]) -> list[float]:
    """Each rank's own time over the median of the others' (the larger of two in the middle).

    1 where there is no other rank, or where nothing was measured.
    """
    found = []
    for i, time in enumerate(times):
        others = [other.total_s for other in (*times[:i], *times[i + 1 :])]
        middle = statistics.median_high(others) if others else 0.0
        found.append(time.total_s / middle if middle > 0 else 1.0)
    return found


def slow_ranks(times: Sequence[OwnTime], step_s: float) -> list[int]:
    """Indices into ``times`` of an epoch's slow ranks.

    Slow is whose own time is over 1.5 times the median of the other ranks' and over that by at least a twentieth of a step
    (``step_s``). So it is compared with the other one where there are two, up to half of the ranks are found whatever their
    times are, and where more are slow, that is the pace of the run and nobody is named.
    """
    found = []
    for i, ratio in enumerate(slowness(times)):
        if ratio > SLOW and times[i].total_s * (1 - 1 / ratio) >= COSTS * step_s:
            found.append(i)
    return found


def watch(session: Session, clock: Clock) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """This epoch's stragglers as plain values, alike on all ranks, and this rank's numbers for ``Run.report``. Collective.

    A straggler was slow in this epoch and in the one before, of this attempt: an odd epoch, such as the first one with its
    caches to fill, names nobody.
    """
    times = collectives.gather_to_all(own_time(session.run.rank, clock))
    ratios, step_s = slowness(times), clock.train_s / max(clock.num_steps, 1)
    slow = collectives.from_rank_0(slow_ranks(times, step_s))
    named, session.slow_before = [i for i in slow if i in session.slow_before], frozenset(slow)
    rows = [
        {
            "rank": times[i].rank,
            "host": times[i].host,
            "slowness": ratios[i],
            "data_wait_s": times[i].data_wait_s,
            "forward_s": times[i].forward_s,
        }
        for i in named
    ]
    own = session.run.rank
    return rows, {"rank_slowness": ratios[own], "rank_straggler": float(own in named)}
