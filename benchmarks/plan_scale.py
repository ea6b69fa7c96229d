"""How large a data set can be planned: one rank's whole epoch and a resume, from the per-shard counts alone.

    python benchmarks/plan_scale.py                     10^8 samples, 10^5 shards, 1,024 ranks
    python benchmarks/plan_scale.py --samples 1000000   a smoke run

Each row runs in a process of its own, so that its peak memory is its own. Peer: PyTorch's ``DistributedSampler``, which
knows no shards, and cannot resume within an epoch but by skipping.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

SEED, EPOCH = 7, 3


def counts_of(samples: int, shards: int) -> np.ndarray:
    """Shards of unequal length, as real ones are: int64 [shards]."""
    draws = np.random.default_rng(0).uniform(0.5, 1.5, shards)
    edges = np.rint(np.cumsum(draws) / draws.sum() * samples).astype(np.int64)
    return np.diff(edges, prepend=0)


def planned(args: argparse.Namespace, weighted: bool) -> tuple:
    from medtl_dist.data.plan import run_length_for, train_plan, weigh

    counts = counts_of(args.samples, args.shards)
    weighting = None
    if weighted:  # a class of 15 %, drawn as often as the other
        rare = np.random.default_rng(1).binomial(counts, 0.15)
        weighting = weigh(np.stack([counts - rare, rare], axis=1))
    run_length = run_length_for(args.samples, 12_000, args.ranks)
    options = {"global_batch_size": 16 * args.ranks, "seed": SEED, "epoch": EPOCH, "max_lanes": args.ranks}
    return train_plan(counts, run_length=run_length, weighting=weighting, **options), counts


def one_rank(args: argparse.Namespace, *, start: float = 0.0, weighted: bool = False) -> int:
    """Walk every window of the middle rank's lanes from ``start`` (share of the epoch) on; returns the samples seen."""
    plan, _counts = planned(args, weighted)
    step = int(plan.num_steps * start)
    seen = 0
    strata = None
    for lane in plan.lanes_of(args.ranks // 2, args.ranks):
        for pieces, order in plan.windows(lane, step):
            seen += len(order)
            if plan.weighting is None:
                continue
            for piece in pieces:  # what a reader does besides: which samples the rows of the shard stand for
                strata = np.repeat([0, 1], plan.weighting.counts[piece.shard])
                plan.weighting.virtual_rows(piece.shard, strata, SEED, EPOCH)
    assert seen == (plan.num_steps - step) * plan.global_batch_size // args.ranks
    return seen


def first_of_resume(args: argparse.Namespace) -> int:
    """The first batch of every lane of one rank, three quarters into the epoch."""
    plan, _ = planned(args, False)
    return len(plan.step(plan.num_steps * 3 // 4, args.ranks // 2, args.ranks))


def distributed_sampler(args: argparse.Namespace) -> int:
    from torch.utils.data import DistributedSampler

    sampler = DistributedSampler(range(args.samples), num_replicas=args.ranks, rank=args.ranks // 2, seed=SEED)  # pyright: ignore[reportArgumentType]
    sampler.set_epoch(EPOCH)
    return sum(1 for _ in sampler)


ROWS: dict[str, Callable[[argparse.Namespace], int]] = {
    "one rank's epoch": one_rank,
    "resume at 3/4, to its end": lambda args: one_rank(args, start=0.75),
    "resume at 3/4, first batch": first_of_resume,
    "one rank's epoch, classes balanced": lambda args: one_rank(args, weighted=True),
    "peer: DistributedSampler, one rank's epoch": distributed_sampler,
}


def measured(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    for name in ROWS:
        command = [sys.executable, __file__, "--row", name]
        command += [f"--{key}={getattr(args, key)}" for key in ("samples", "shards", "ranks")]
        yield name, json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**8)
    parser.add_argument("--shards", type=int, default=10**5)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        begun = time.perf_counter()
        seen = ROWS[args.row](args)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(json.dumps({"s": time.perf_counter() - begun, "mib": peak, "seen": seen}))
        return
    print(
        f"{args.samples:,} samples, {args.shards:,} shards, {args.ranks:,} ranks; a process per row, imports included"
    )
    print(f"{'':44}{'seconds':>9}{'peak MiB':>10}{'samples':>12}")
    for name, row in measured(args):
        print(f"{name:44}{row['s']:9.2f}{row['mib']:10.0f}{row['seen']:12,}", flush=True)


if __name__ == "__main__":
    main()
