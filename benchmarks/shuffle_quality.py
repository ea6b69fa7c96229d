"""How well batches are mixed: the order of data/plan.py against a perfect shuffle and webdataset's usual one.

    python benchmarks/shuffle_quality.py

Two measures per set and order, each divided by its value under a perfect shuffle (so 1 is perfect):

* spread: variance of the number of positives in a batch, over the hypergeometric variance. Above 1, batches are more
  unlike each other than chance makes them; a set stored class by class and read in order has about B.
* again: pairs of samples that share a batch in two epochs following each other. Above 1, the same company returns.

Packed sets lie shuffled in their shards (``medtl data pack`` does that); adopted ones lie as their maker left them: here
the worst case, class by class, and patient by patient (as a hospital's archive would be, 10 images each, one class).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.plan import lanes_for, run_length_for, train_plan

Order = Callable[[int], NDArray[np.int64]]  # of an epoch: samples in the order of their use
EPOCHS = 6


def ours(shards: NDArray[np.int64], batch: int) -> Order:
    starts = np.cumsum(shards) - shards
    length = run_length_for(int(shards.sum()), 12_000, lanes_for(batch))

    def order(epoch: int) -> NDArray[np.int64]:
        plan = train_plan(shards, global_batch_size=batch, seed=0, epoch=epoch, run_length=length)
        lanes = [[starts[shard] + row for shard, row in plan.samples(lane)] for lane in range(plan.num_lanes)]
        by_step = np.array(lanes).reshape(plan.num_lanes, plan.num_steps, plan.lane_batch)
        return by_step.transpose(1, 0, 2).reshape(-1)

    return order


def buffered(shards: NDArray[np.int64], size: int = 1000) -> Order:
    """Shards permuted, then a buffer from which a random sample is taken for each that enters."""
    edges = [0, *np.cumsum(shards).tolist()]

    def order(epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng(epoch)
        stream = np.concatenate([np.arange(edges[s], edges[s + 1]) for s in rng.permutation(len(shards))])
        buffer, out = stream[:size].copy(), []
        for sample in stream[size:]:
            place = rng.integers(len(buffer))
            out.append(buffer[place])
            buffer[place] = sample
        return np.concatenate([np.array(out, np.int64), rng.permutation(buffer)])

    return order


def spread(order: Order, positive: NDArray[np.int64], batch: int) -> float:
    found = []
    for epoch in range(EPOCHS):
        used = positive[order(epoch)]
        found.append(used[: len(used) // batch * batch].reshape(-1, batch).sum(axis=1).var())
    n, share = len(positive), positive.mean()
    return float(np.mean(found) / (batch * share * (1 - share) * (n - batch) / (n - 1)))


def again(order: Order, n: int, batch: int) -> float:
    ratios = []
    place_before = None
    for epoch in range(EPOCHS):
        used = order(epoch)
        used = used[: len(used) // batch * batch]
        place = np.full(n, -1)
        place[used] = np.arange(len(used)) // batch
        if place_before is not None:
            both = (place >= 0) & (place_before >= 0)
            _, sizes = np.unique(np.stack([place[both], place_before[both]]), axis=1, return_counts=True)
            pairs = (sizes * (sizes - 1) / 2).sum()
            expected = len(used) * (batch - 1) / 2 * (batch - 1) / (n - 1)
            ratios.append(pairs / expected)
        place_before = place
    return float(np.mean(ratios))


def sets(samples: int) -> dict[str, NDArray[np.int64]]:
    """Labels (0 or 1; 25 % positive) by place in the set."""
    rng = np.random.default_rng(0)
    by_class = np.sort((np.arange(samples) % 4 == 0).astype(np.int64))
    patients = np.repeat((rng.random(samples // 10 + 1) < 0.25).astype(np.int64), 10)[:samples]
    return {
        "packed (shuffled)": rng.permutation(by_class),
        "adopted, patient by patient": patients,
        "adopted, class by class": by_class,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[5_000, 100_000])
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    for samples in args.samples:
        shards = np.full(max(8, samples // 1000), samples // max(8, samples // 1000))
        n = int(shards.sum())
        print(f"{n:,} samples, {len(shards)} shards, batches of {args.batch}; 1 = a perfect shuffle")
        print(f"{'set':30}{'order':22}{'spread':>8}{'again':>8}")
        for name, positive in sets(n).items():
            orders = {
                "ours": ours(shards, args.batch),
                "shards + buffer 1,000": buffered(shards),
                "perfect": lambda epoch, n=n: np.random.default_rng(epoch).permutation(n),
            }
            for label, order in orders.items():
                print(
                    f"{name:30}{label:22}{spread(order, positive, args.batch):8.2f}{again(order, n, args.batch):8.2f}"
                )


if __name__ == "__main__":
    main()
