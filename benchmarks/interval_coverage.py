"""How often the intervals of metrics/ hold the truth: simulated patients with correlated images → a table.

Run: python benchmarks/interval_coverage.py            (minutes on one core; the figures are in docs/intervals.md)

A patient of class y has images with scores ``d*y + sqrt(rho) u + sqrt(1 - rho) e``, u of the patient, e of the image,
both standard normal: the AUC is Phi(d / sqrt(2)) and two images of a patient correlate by rho. In the rows "with both"
every patient has images of both classes. Beside our interval: that of somebody who forgets the patients (image-level
DeLong), the same variance without the logit scale, and the patient bootstrap.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from medtl_dist.metrics.bootstrap import bootstrap_auc
from medtl_dist.metrics.intervals import auc_interval
from medtl_dist.metrics.proportions import proportion

IMAGES = 3  # of each patient; of each patient and class in the "both" rows
NORMAL = NormalDist()


@dataclass(frozen=True)
class Scenario:
    """``patients`` in each class (or in all, where every patient has both), true AUC, correlation within a patient."""

    patients: int
    auc: float
    rho: float
    both: bool = False

    def __str__(self) -> str:
        who = f"{self.patients} with both" if self.both else f"{self.patients} + {self.patients}"
        return f"| {who} | {self.auc:.2f} | {self.rho:.1f} "


SCENARIOS = [
    *(Scenario(patients, auc, rho) for patients in (20, 50) for auc in (0.8, 0.95) for rho in (0.5, 0.8)),
    *(Scenario(patients, 0.8, 0.5, both=True) for patients in (20, 50)),
]


def simulate(scenario: Scenario, rng: np.random.Generator) -> tuple[NDArray, NDArray, NDArray]:
    """Labels {0, 1}, scores and patients of one simulated study, [n] each."""
    labels = np.repeat([1, 0], scenario.patients * IMAGES)
    names = np.repeat(np.arange(scenario.patients), IMAGES)
    groups = np.concatenate([names, names + (0 if scenario.both else scenario.patients)])
    shift = math.sqrt(2) * NORMAL.inv_cdf(scenario.auc)
    patient = rng.standard_normal(2 * scenario.patients)[groups]
    image = rng.standard_normal(len(labels))
    return labels, shift * labels + math.sqrt(scenario.rho) * patient + math.sqrt(1 - scenario.rho) * image, groups


def true_auc(scenario: Scenario) -> float:
    """The AUC that the estimator estimates. With both classes in a patient a share 1/patients of the pairs is within
    one patient, where the patient's part of the score cancels."""
    if not scenario.both:
        return scenario.auc
    shift = math.sqrt(2) * NORMAL.inv_cdf(scenario.auc)
    within = NORMAL.cdf(shift / math.sqrt(2 * (1 - scenario.rho)))
    return scenario.auc + (within - scenario.auc) / scenario.patients


Interval = tuple[float, float] | None


def intervals_of(labels: NDArray, scores: NDArray, groups: NDArray, replicates: int, seed: int) -> dict[str, Interval]:
    """The 95 % intervals of one study by each method."""
    clustered = auc_interval(labels, scores, groups)
    assert clustered.auc is not None
    plain: Interval = None
    if clustered.variance:
        half = 1.96 * math.sqrt(clustered.variance)
        plain = clustered.auc - half, clustered.auc + half
    return {
        "clustered DeLong, logit (ours)": clustered.interval,
        "clustered DeLong, plain scale": plain,
        "image-level DeLong, logit": auc_interval(labels, scores).interval,
        "patient bootstrap": bootstrap_auc(labels, scores, groups, num_replicates=replicates, seed=seed),
    }


def auc_rows(num_studies: int, replicates: int, seed: int) -> Iterator[str]:
    """Rows of the table of AUC intervals, after its head."""
    head = list(intervals_of(*simulate(SCENARIOS[0], np.random.default_rng(0)), replicates=10, seed=0))
    yield "| patients | AUC | rho | " + " | ".join(head) + " |"
    yield "|---|---|---|" + "---|" * len(head)
    for index, scenario in enumerate(SCENARIOS):
        rng = np.random.default_rng([seed, index])
        truth = true_auc(scenario)
        found: dict[str, list[Interval]] = {name: [] for name in head}
        for study in range(num_studies):
            for name, interval in intervals_of(*simulate(scenario, rng), replicates, study).items():
                found[name].append(interval)
        yield f"{scenario}| " + " | ".join(cell(found[name], truth) for name in head) + " |"


def proportion_rows(num_studies: int, seed: int) -> Iterator[str]:
    """Rows of the table of sensitivity intervals: the images of positive patients, called at a fixed threshold."""
    yield "| positive patients | sensitivity | rho | Wilson with design effect (ours) | Wilson, patients forgotten |"
    yield "|---|---|---|---|---|"
    cases = [(patients, truth, rho) for patients in (20, 50) for truth in (0.8, 0.95) for rho in (0.5, 0.8)]
    for index, (patients, truth, rho) in enumerate(cases):
        rng = np.random.default_rng([seed, 1000 + index])
        groups = np.repeat(np.arange(patients), IMAGES)
        ours: list[Interval] = []
        forgetful: list[Interval] = []
        for _ in range(num_studies):
            patient = rng.standard_normal(patients)[groups]
            scores = math.sqrt(rho) * patient + math.sqrt(1 - rho) * rng.standard_normal(len(groups))
            hits = scores < NORMAL.inv_cdf(truth)
            ours.append(tuple(proportion(hits, groups)["ci"]))
            forgetful.append(tuple(proportion(hits)["ci"]))
        yield f"| {patients} | {truth:.2f} | {rho:.1f} | {cell(ours, truth)} | {cell(forgetful, truth)} |"


def cell(found: list[Interval], truth: float) -> str:
    """Coverage ± its Monte-Carlo standard error in percent, and the median width; no interval counts as a miss."""
    covered = np.mean([interval is not None and interval[0] <= truth <= interval[1] for interval in found])
    error = math.sqrt(covered * (1 - covered) / len(found))
    width = np.median([interval[1] - interval[0] for interval in found if interval is not None])
    return f"{100 * covered:.1f} ± {100 * error:.1f} ({width:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies per row (default 2000)")
    parser.add_argument("--replicates", type=int, default=1000, help="bootstrap replicates per study (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.perf_counter()
    print(f"95 % intervals, {IMAGES} images a patient: coverage in % ± Monte-Carlo error (median width)\n")
    for row in auc_rows(given.studies, given.replicates, given.seed):
        print(row, flush=True)
    print()
    for row in proportion_rows(given.studies, given.seed):
        print(row, flush=True)
    print(
        f"\n{given.studies} studies a row, {given.replicates} replicates, seed {given.seed}, "
        f"numpy {np.__version__}, {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
