"""shards ─► order of samples: who reads what, and when, as arithmetic on the per-shard counts alone.

Training (``train_plan``). P lanes, P the largest divisor of the global batch B that is ≤ ``max_lanes``; b = B / P::

    runs    consecutive pieces of ≤ run_length samples of one shard, as equal as they can be
    order   the runs permuted by (seed, epoch), laid end to end: N positions; the ring is then turned by a seeded
            offset, so what the cut leaves out differs between epochs even where there is a single run
    steps   S = N // B; lane p owns the positions [p·S·b, (p+1)·S·b); the rest, fewer than B, is left out this epoch
    window  two runs of a lane, permuted by (seed, epoch, lane, window): what a reader holds in memory
    step s  of every lane its samples [s·b, (s+1)·b); rank r of W ≤ P reads the lanes [r·P//W, (r+1)·P//W)

So step s holds the same samples in the same order at every world size (parts joined in lane order), all ranks make
equally many steps, and nothing here grows with the number of samples, only with the number of runs.

Weighted sampling (``Weighting``): a sample of weight w appears ⌊w⌋ or ⌈w⌉ times an epoch, each stratum (class or domain)
equally often every epoch. A shard then stands for *virtual rows*: round after round, first every sample that appears at
all, then those that appear twice, … The runs are cut from the rounds, so the rest holds as it is, repeats of a sample lie
in different runs, and the numbers of samples per shard and stratum still suffice; ``virtual_rows`` tells which sample a
virtual row is, once the reader knows the strata of a shard's samples.

Evaluation (``eval_plan``): batches of consecutive samples in index order, each sample once, whoever reads them.

Randomness is Philox4x64-10 (Salmon et al., SC 2011), keyed by (seed, epoch) and counted by (purpose, lane, window).
Only its raw 64-bit output is used, sorted to give permutations: NumPy promises that output to be the same in every
version (NEP 19), which it does not of ``Generator.permutation``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medtl_dist.errors import DataError, UserError

IntArray = npt.NDArray[np.int64]

MAX_LANES = 64
RUN_SAMPLES = 128
RUN_BYTES = 2 * 2**20
RUNS_PER_WINDOW = 2

MAX_WEIGHT = 100  # rounds of a shard; the plan's memory grows with them

# Word 3 of Philox's counter: streams of different purpose never meet.
_RUN_ORDER, _TURN, _WINDOW, _QUOTA, _CHOICE = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Piece:
    """Samples ``[start, stop)`` of the shard at position ``shard`` among the split's shards."""

    shard: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Weighting:
    """How often the samples of each stratum appear in an epoch.

    Attributes:
        counts: int64 [shards, strata], samples.
        totals: int64 [strata], appearances per epoch of all samples of the stratum together; its weight is
            ``totals / counts.sum(0)``.
    """

    counts: IntArray
    totals: IntArray

    def virtual_rows(self, shard: int, strata: IntArray, seed: int, epoch: int) -> IntArray:
        """The samples that a shard's virtual rows stand for in an epoch, rising within each round.

        Args:
            strata: int64 [samples of the shard], the stratum of each.

        Raises: DataError, other numbers of samples per stratum than the plan was made from.
        """
        num_strata = len(self.totals)
        if not np.array_equal(np.bincount(strata, minlength=num_strata), self.counts[shard]):
            raise DataError("its classes or domains differ from those that dataset.json counts")
        whole, extra = self._quota(seed, epoch)
        times = whole[strata]
        for stratum in range(num_strata):
            rows = np.flatnonzero(strata == stratum)
            chosen = _permutation(len(rows), seed, epoch, (_CHOICE, stratum, shard))[: int(extra[shard, stratum])]
            times[rows[chosen]] += 1
        rounds = [np.flatnonzero(times > number) for number in range(int(times.max(initial=0)))]
        return np.concatenate([np.zeros(0, np.int64), *rounds])

    def _rounds(self, seed: int, epoch: int) -> IntArray:
        """int64 [shards, rounds]: samples of each round of each shard."""
        whole, extra = self._quota(seed, epoch)
        sizes = [
            np.where(number < whole, self.counts, np.where(number == whole, extra, 0)).sum(axis=1)
            for number in range(int(whole.max(initial=0)) + 1)
        ]
        return np.stack(sizes, axis=1)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - asked for every shard of an epoch; holds at most four plans' arrays
    def _quota(self, seed: int, epoch: int) -> tuple[IntArray, IntArray]:
        """int64 [strata], how often each sample appears at least; [shards, strata], how many appear once more.

        The extra ones are dealt along the shards in proportion, from a seeded start: in whole numbers, so that they
        add up to the same every epoch, and every sample has the same chance.
        """
        samples = np.maximum(self.counts.sum(axis=0), 1)
        whole = self.totals // samples
        rest = self.totals - whole * samples
        turn = (_raw(len(samples), seed, epoch, (_QUOTA, 0, 0)) % samples.astype(np.uint64)).astype(np.int64)
        before = np.concatenate([np.zeros((1, len(samples)), np.int64), np.cumsum(self.counts, axis=0)])
        return whole, np.diff((before * rest + turn) // samples, axis=0)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One training epoch. ``_shard, _start`` (of each piece) and ``_edge`` (its first position; one longer, ends
    with N) describe the turned ring of runs; the rest follows from them. With a ``weighting``, N counts appearances
    and rows are virtual (see ``Weighting.virtual_rows``)."""

    num_samples: int
    num_steps: int
    global_batch_size: int
    num_lanes: int
    run_length: int
    seed: int
    epoch: int
    _shard: IntArray
    _start: IntArray
    _edge: IntArray
    weighting: Weighting | None = None

    @property
    def lane_batch(self) -> int:
        """Samples of one lane per step: b = B / P."""
        return self.global_batch_size // self.num_lanes

    @property
    def num_left_out(self) -> int:
        """Samples that this epoch does not use; always fewer than the global batch."""
        return self.num_samples - self.num_steps * self.global_batch_size

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes that a rank reads: contiguous, never none, their numbers differing by at most one.

        Raises: UserError, more ranks than lanes.
        """
        _check_rank(rank, world_size)
        check_world_size(self.num_lanes, world_size, self.global_batch_size)
        return range(rank * self.num_lanes // world_size, (rank + 1) * self.num_lanes // world_size)

    def windows(self, lane: int, start_step: int = 0) -> Iterator[tuple[list[Piece], IntArray]]:
        """The lane's windows from ``start_step`` on, lazily: the pieces to read, and the order in which to use their
        samples (int64, places in the pieces laid end to end; the first window's without the samples of earlier steps).
        """
        if not 0 <= lane < self.num_lanes:
            raise ValueError(f"lane {lane} of {self.num_lanes}")
        if not 0 <= start_step <= self.num_steps:
            raise ValueError(f"start_step {start_step} of {self.num_steps}")
        size = self.num_steps * self.lane_batch
        low, high = lane * size, (lane + 1) * size
        first = int(np.searchsorted(self._edge, low, side="right")) - 1
        last = int(np.searchsorted(self._edge, high, side="left"))
        skip = start_step * self.lane_batch
        for window, begin in enumerate(range(first, last, RUNS_PER_WINDOW)):
            end = min(begin + RUNS_PER_WINDOW, last)
            length = min(int(self._edge[end]), high) - max(int(self._edge[begin]), low)
            if skip >= length:
                skip -= length
                continue
            pieces = [self._piece(position, low, high) for position in range(begin, end)]
            order = _permutation(length, self.seed, self.epoch, (_WINDOW, lane, window))
            yield pieces, order[skip:]
            skip = 0

    def samples(self, lane: int, start_step: int = 0) -> Iterator[tuple[int, int]]:
        """The lane's samples in order as (shard, row within the shard), from ``start_step`` on."""
        for pieces, order in self.windows(lane, start_step):
            flat = [(piece.shard, row) for piece in pieces for row in range(piece.start, piece.stop)]
            for place in order.tolist():
                yield flat[place]

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
        """The (shard, row) of one step of one rank, in order. Seeks: meant for tests and inspection."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} of {self.num_steps}")
        found: list[tuple[int, int]] = []
        for lane in self.lanes_of(rank, world_size):
            samples = self.samples(lane, step)
            found += [next(samples) for _ in range(self.lane_batch)]
        return found

    def _piece(self, position: int, low: int, high: int) -> Piece:
        edge = int(self._edge[position])
        start = int(self._start[position])
        cut_low = max(low - edge, 0)
        cut_high = min(int(self._edge[position + 1]), high) - edge
        return Piece(int(self._shard[position]), start + cut_low, start + cut_high)


@dataclass(frozen=True, eq=False)
class EvalPlan:
    """Every sample once, in batches of consecutive samples that depend on neither ranks nor loader workers."""

    num_samples: int
    batch_size: int
    _edge: IntArray

    @property
    def num_batches(self) -> int:
        """U = ceil(N / batch_size); the last batch may be short."""
        return -(-self.num_samples // self.batch_size)

    def batches_of(self, rank: int, world_size: int) -> range:
        """The rank's contiguous share of the batches; empty where there are more ranks than batches."""
        _check_rank(rank, world_size)
        return range(rank * self.num_batches // world_size, (rank + 1) * self.num_batches // world_size)

    def batch(self, number: int) -> list[Piece]:
        """The samples of one batch, in index order."""
        if not 0 <= number < self.num_batches:
            raise ValueError(f"batch {number} of {self.num_batches}")
        low = number * self.batch_size
        high = min(low + self.batch_size, self.num_samples)
        pieces = []
        # side="right" steps over empty shards, whose edges coincide.
        shard = int(np.searchsorted(self._edge, low, side="right")) - 1
        while low < high:
            stop = min(int(self._edge[shard + 1]), high)
            if stop > low:
                edge = int(self._edge[shard])
                pieces.append(Piece(shard, low - edge, stop - edge))
                low = stop
            shard += 1
        return pieces


def train_plan(
    shard_counts: Sequence[int] | IntArray,
    *,
    global_batch_size: int,
    seed: int,
    epoch: int,
    max_lanes: int = MAX_LANES,
    run_length: int = RUN_SAMPLES,
    weighting: Weighting | None = None,
) -> EpochPlan:
    """The order of one training epoch over shards of the given numbers of samples.

    Raises: UserError, fewer samples than one global batch.
    """
    counts = _counts(shard_counts)
    if weighting is not None and not np.array_equal(weighting.counts.sum(axis=1), counts):
        raise ValueError("the strata do not add up to the shards' samples")
    if min(seed, epoch) < 0 or run_length < 1:
        raise ValueError(f"seed {seed} and epoch {epoch} must be ≥ 0, run_length {run_length} ≥ 1")
    num_lanes = lanes_for(global_batch_size, max_lanes)
    rounds = counts[:, None] if weighting is None else weighting._rounds(seed, epoch)
    num_samples = int(rounds.sum())
    num_steps = num_samples // global_batch_size
    if num_steps == 0:
        raise UserError(_too_few(num_samples, int(counts.sum()), global_batch_size))
    shard, start, length = _runs(rounds, run_length)
    order = _permutation(len(length), seed, epoch, (_RUN_ORDER, 0, 0))
    shard, start, length = shard[order], start[order], length[order]
    # Turn the ring inside its first run: the run's head goes to the end.
    turn = _raw(1, seed, epoch, (_TURN, 0, 0)).item() % int(length[0])
    if turn:
        shard, start, length = np.append(shard, shard[0]), np.append(start, start[0]), np.append(length, turn)
        start[0] += turn
        length[0] -= turn
    edge = np.concatenate([np.zeros(1, np.int64), np.cumsum(length)])
    return EpochPlan(
        num_samples, num_steps, global_batch_size, num_lanes, run_length, seed, epoch, shard, start, edge, weighting
    )


def _too_few(num_used: int, num_samples: int, global_batch_size: int) -> str:
    if num_samples == 0:
        return "the training split is empty: pack a set that has training images"
    if num_used < num_samples:
        return (
            f"data.sampling_weights leave {num_used} appearances of {num_samples} training samples per epoch, fewer than "
            f"data.global_batch_size = {global_batch_size}: raise the weights or lower the batch"
        )
    return (
        f"{num_samples} training samples are fewer than data.global_batch_size = {global_batch_size}: "
        f"lower data.global_batch_size to at most {num_samples}, or pack more images"
    )


def eval_plan(shard_counts: Sequence[int] | IntArray, batch_size: int) -> EvalPlan:
    """Batches of ``batch_size`` consecutive samples over the shards, in index order."""
    counts = _counts(shard_counts)
    if batch_size < 1:
        raise UserError(f"an evaluation batch of {batch_size} samples is impossible: give 1 or more")
    return EvalPlan(int(counts.sum()), batch_size, np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))


def weigh(counts: IntArray, weights: Sequence[float] | None = None) -> Weighting:
    """How often the samples of each stratum appear in an epoch.

    Args:
        counts: int64 [shards, strata], samples.
        weights: per stratum, how often each of its samples appears on average; None: balanced, so that each stratum
            that has samples appears equally often, in as many appearances altogether as there are samples.

    Raises: UserError, a weight that is negative or beyond ``MAX_WEIGHT``.
    """
    samples = counts.sum(axis=0)
    if weights is None:
        present = samples > 0
        share, rest = divmod(int(samples.sum()), max(int(present.sum()), 1))
        totals = np.where(present, share, 0)
        totals[np.flatnonzero(present)[:rest]] += 1
    else:
        asked = np.asarray(weights, np.float64)
        if not np.isfinite(asked).all() or (asked < 0).any():
            raise UserError(f"sampling weights {list(weights)}: numbers from 0 on expected")
        totals = np.rint(asked * samples).astype(np.int64)
    if (totals > MAX_WEIGHT * samples).any():
        most = float((totals / np.maximum(samples, 1)).max())
        raise UserError(
            f"a sample would appear {most:.0f} times an epoch, more than {MAX_WEIGHT}: give data.sampling_weights of "
            f"at most {MAX_WEIGHT} by name, for example one below for the rarest"
        )
    return Weighting(counts.astype(np.int64), totals.astype(np.int64))


def lanes_for(global_batch_size: int, max_lanes: int = MAX_LANES) -> int:
    """P: the largest divisor of the global batch that is ≤ ``max_lanes``. Raises: UserError, either is below 1."""
    if global_batch_size < 1 or max_lanes < 1:
        raise UserError(
            f"data.global_batch_size = {global_batch_size} with data.lanes = {max_lanes} is impossible: "
            "both must be 1 or more"
        )
    return next(lanes for lanes in range(min(max_lanes, global_batch_size), 0, -1) if global_batch_size % lanes == 0)


def check_world_size(num_lanes: int, world_size: int, global_batch_size: int) -> None:
    """Raises: UserError, more ranks than lanes: some rank would have nothing to read."""
    if world_size > num_lanes:
        raise UserError(
            f"{world_size} workers are more than the {num_lanes} lanes of data.global_batch_size = {global_batch_size} "
            f"(its largest divisor within data.lanes): use at most {num_lanes} workers, make data.global_batch_size "
            f"a multiple of {world_size}, or raise data.lanes"
        )


def run_length_for(num_samples: int, mean_sample_bytes: float, num_lanes: int) -> int:
    """Samples per run: as many as fit in 2 MiB, at most 128, and few enough that a lane spans several runs.

    Long runs make few, large reads; short ones a better shuffle. A small set is read cheaply anyhow, so there
    each lane gets at least about 8 runs. Depends on the set and the global batch alone, never on the world size.
    """
    by_bytes = int(RUN_BYTES / max(mean_sample_bytes, 1.0))
    return max(1, min(RUN_SAMPLES, by_bytes, num_samples // (8 * num_lanes)))


def _runs(rounds: IntArray, run_length: int) -> tuple[IntArray, IntArray, IntArray]:
    """Shard, first row and length (int64 [runs] each) of every run: each round cut into the fewest runs, equal ±1.

    ``rounds``: int64 [shards, rounds], their lengths; the rows of a shard are its rounds laid end to end.
    """
    sizes = rounds.reshape(-1)
    before = (np.cumsum(rounds, axis=1) - rounds).reshape(-1)
    num_runs = -(-sizes // run_length)
    piece = np.repeat(np.arange(len(sizes), dtype=np.int64), num_runs)
    number = np.arange(len(piece), dtype=np.int64) - np.repeat(np.cumsum(num_runs) - num_runs, num_runs)
    start = number * sizes[piece] // num_runs[piece]
    stop = (number + 1) * sizes[piece] // num_runs[piece]
    return piece // rounds.shape[1], before[piece] + start, stop - start


def _raw(count: int, seed: int, epoch: int, stream: tuple[int, int, int]) -> npt.NDArray[np.uint64]:
    """uint64 [count]: raw Philox output of the stream (purpose, lane, window) under the key (seed, epoch)."""
    purpose, lane, window = stream
    # Word 0 counts the blocks within a stream, so streams that differ in another word cannot overlap.
    counter = np.array([0, window, lane, purpose], np.uint64)
    return np.random.Philox(counter=counter, key=np.array([seed, epoch], np.uint64)).random_raw(count)


def _permutation(count: int, seed: int, epoch: int, stream: tuple[int, int, int]) -> IntArray:
    return np.argsort(_raw(count, seed, epoch, stream), kind="stable").astype(np.int64, copy=False)


def _counts(shard_counts: Sequence[int] | IntArray) -> IntArray:
    counts = np.asarray(shard_counts, dtype=np.int64).reshape(-1)
    if (counts < 0).any():
        raise ValueError("negative number of samples in a shard")
    return counts


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
