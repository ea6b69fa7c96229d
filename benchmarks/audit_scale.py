"""The audit's search at a million images: synthetic fingerprints with planted copies → time, memory, recall.

Run: python benchmarks/audit_scale.py --images 1000000 [--set DEST]     (figures in docs/audit.md; one process)

Fingerprints are drawn from a normal law with the mean and covariance of a real set's DCT coefficients (``--set``), or of a
built-in model with the spread that chest X-rays have. In every hundredth image a copy is planted: another image
cropped by up to 10 % a side (in the coefficients), with 3 % noise, as it is or in one of the other fifteen variants.
What is measured: reading no pixels, how long projection and search take, the pairs that would be registered, how many of
them are chance, and how many planted copies are among them. Pixels of synthetic images do not exist: what registration
makes of chance pairs is measured on real images (benchmarks/audit_recall.py).
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.audit import worth_comparing
from medtl_dist.data.audit_align import crop_matrices, unpack
from medtl_dist.data.audit_match import FALSE_CONFIRMED
from medtl_dist.data.audit_scan import open_pool, scan
from medtl_dist.data.audit_search import Pairs, find_pairs, fit_projection
from medtl_dist.data.fingerprint import COLUMNS, NUM_VARIANTS, RECORD, ROWS, coefficients, pack_coefs, variant_operator
from medtl_dist.data.shards import open_dataset

_CHUNK = 2**15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--set", type=Path, help="a packed set whose statistics are used")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    mean, covariance = model_of(options.set)
    records, originals, copies = simulate(options.images, mean, covariance, options.seed)
    print(
        f"{options.images:,} images, {len(copies):,} planted copies, {records.nbytes / options.images:.0f} bytes each"
    )
    begin, processor = time.perf_counter(), time.process_time()
    projection = fit_projection(records)
    found = find_pairs(records, projection, progress=_say(begin))
    wall, processor = time.perf_counter() - begin, time.process_time() - processor
    print_figures(found, originals, copies, options.images)
    print(f"time {wall:.0f} s ({processor:.0f} s of processor), peak memory {_peak_mib():,.0f} MiB")


def model_of(folder: Path | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [135] and covariance [135, 135] of the coefficients: a real set's, or the built-in ones."""
    if folder is not None:
        dataset = open_dataset(folder)
        with open_pool(dataset, 1) as pool:
            coefs = coefficients(scan(dataset, pool, lambda stage, done, total: None).records).astype(np.float64)
        return coefs.mean(axis=0), np.cov(coefs.T)
    # Spread and common look of Kermany's chest X-rays fall with the frequency about like this.
    frequency = (ROWS + COLUMNS).astype(np.float64)
    return 7.0 * frequency**-1.3 * np.where(COLUMNS % 2, 0.3, 1.0), np.diag(np.square(2.6 * np.exp(-frequency / 7.0)))


def simulate(
    count: int, mean: NDArray[np.float64], covariance: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.int64]]:
    """Records [count], and the positions of the planted copies' originals and of the copies."""
    rng = np.random.default_rng(seed)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
    records = np.zeros(count, RECORD)
    records["pixels"][:, 0] = np.arange(count)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        coefs = rng.standard_normal((size, len(mean)), np.float32) @ root.T + mean.astype(np.float32)
        records["coefs"][start : start + size] = pack_coefs(coefs)
    places = rng.permutation(count)
    planted = max(1, count // 100)
    originals, copies = places[:planted], places[planted : 2 * planted]
    lost = rng.uniform(0, 0.1, (planted, 2))
    begins = lost * rng.uniform(0, 1, (planted, 2))
    y, x = (crop_matrices(begins[:, axis], 1 - lost[:, axis]) for axis in (0, 1))
    cropped = (y @ unpack(coefficients(records[originals])) @ x.transpose(0, 2, 1))[:, ROWS, COLUMNS]
    cropped += 0.03 * np.sqrt(np.diag(covariance)) * rng.standard_normal(cropped.shape)
    for number in range(NUM_VARIANTS):
        order, sign = variant_operator(number)
        inside = np.arange(planted) % NUM_VARIANTS == number
        cropped[inside] = cropped[inside][:, order] * sign
    records["coefs"][copies] = pack_coefs(cropped)
    return records, originals, copies


def print_figures(found: Pairs, originals: NDArray[np.int64], copies: NDArray[np.int64], images: int) -> None:
    """Recall of the planted copies and the pairs of chance, per 100,000 images."""
    pair = found.first * images + found.second
    planted = np.minimum(originals, copies) * images + np.maximum(originals, copies)
    agreeing = worth_comparing(found, images)
    real = np.isin(pair, planted)
    searched, kept = np.isin(planted, pair), np.isin(planted, pair[agreeing])
    share = 1e5 / images
    least = found.score[agreeing].min(initial=1.0)
    print(f"pairs aligned {len(pair):,}; to be registered {len(agreeing):,}, of agreement {least:.3f} and more")
    print(f"planted copies: aligned {searched.mean():.1%}, to be registered {kept.mean():.1%}")
    for name, some in (
        ("as they are", np.arange(len(planted)) % NUM_VARIANTS == 0),
        ("turned or negative", np.arange(len(planted)) % NUM_VARIANTS > 0),
    ):
        print(f"  {name}: to be registered {kept[some].mean():.1%} of {some.sum():,}")
    print(f"pairs of chance to be registered, per 100,000 images: {(~real[agreeing]).sum() * share:,.0f}")
    print(f"false findings expected per 100,000 images, by the threshold: {FALSE_CONFIRMED * share:.2g}")


def _say(begin: float):
    def say(stage: str, done: int, total: int) -> None:
        print(f"  {time.perf_counter() - begin:7.1f} s  {stage} {done} of {total}; {_peak_mib():,.0f} MiB", flush=True)

    return say


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
