"""Is cross-validation honest on a small set? Sets of pure noise, cross-validated by the real trainer: the mean AUC should be 0.5.

Run: python benchmarks/crossval_noise.py            (a few minutes on one core; the figure is in docs/intervals.md)

A set has 20 images of 8 patients, every pixel drawn at random, and four patients drawn to be sick. `medtl crossval` deals them to
four folds, trains a small network on each three and scores the fourth: nothing can be learnt, so whatever is not 0.5 on
average is a leak or a bias of the pooling. Beside it the AUC of raw scores pooled across the folds, which compares images by
the scores of different models.

A set's line is written to --out once it is done, and not computed again: the script can be stopped and run again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
import time
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

from medtl_dist.cli.main import run

IMAGES_OF = [3, 2, 3, 2, 3, 2, 3, 2]  # a patient: 20 images of 8
PX = 32
SETTINGS = (
    "model.backbone=timm/test_resnet", "train.threads=1", "train.epochs=4", "optim.lr=0.05", "data.global_batch_size=4",
    f"data.image_size_px={PX}", "evaluate.bootstrap_samples=10",
)  # fmt: skip


def write_noise(place: Path, seed: int) -> Path:
    """A table of images of noise; the patients' labels are drawn, too, four of each."""
    rng = np.random.default_rng([seed, 20])
    sick = rng.permutation([0, 1] * 4)
    lines = ["file,label,patient"]
    for patient, count in enumerate(IMAGES_OF):
        for image in range(count):
            name = f"{patient}-{image}.png"
            cv2.imwrite(str(place / name), rng.integers(0, 256, (PX, PX), np.uint8))
            lines.append(f"{name},{('well', 'sick')[sick[patient]]},{patient}")
    (place / "table.csv").write_text("\n".join(lines) + "\n")
    return place / "table.csv"


def measured(seed: int) -> dict[str, float]:
    """A set's AUC by `medtl crossval`, and that of its raw scores across folds."""
    with tempfile.TemporaryDirectory(prefix="medtl-noise-") as scratch:
        place = Path(scratch)
        packed = ["data", "pack", str(write_noise(place, seed)), "--out", str(place / "set"), "--group-col", "patient"]
        settings = (f"data.shards={place / 'set'}", f"train.seed={seed}", *SETTINGS)
        validated = ["crossval", "--folds", "4", "--preset", "smoke", "--run-dir", str(place / "cv")]
        validated += [part for text in settings for part in ("--set", text)]
        told = io.StringIO()
        for command in ([*packed, "--positive", "sick", "--split", "1,0,0", "--workers", "1"], validated):
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                code = run(command)
            if code != 0:
                raise SystemExit(f"medtl {command[0]} ended with {code}: {told.getvalue()}")
        table = pq.read_table(place / "cv" / "predictions" / "oof.parquet").to_pandas()
        assert (len(table), table.group.nunique()) == (20, 8)
        assert (table.groupby("group").fold.nunique() == 1).all(), "a patient lies in two folds"
        found = json.loads((place / "cv" / "crossval.json").read_text())
        return {"seed": seed, "auc": found["auc"], "pooled": float(roc_auc_score(table.label, table.logit_sick))}


def mean_of(values: list[float]) -> str:
    """Mean ± its standard error, and how many of those it is from one half."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return f"{mean:.4f} ± {error:.4f} ({(mean - 0.5) / error:+.1f} standard errors from 0.5)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=50, help="sets of noise (default 50)")
    parser.add_argument(
        "--out", type=Path, help="file of results, a JSON line a set; what it holds is not computed again"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no set after so many seconds")
    given = parser.parse_args()
    began, out = time.perf_counter(), cast("Path | None", given.out)
    done: dict[int, dict[str, float]] = {}
    if out is not None and out.is_file():
        done = {int(row["seed"]): row for row in map(json.loads, out.read_text().splitlines())}
    for seed in range(given.sets):
        if seed in done or time.perf_counter() - began > given.seconds:
            continue
        done[seed] = measured(seed)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(done[seed]) + "\n")
    rows = [done[seed] for seed in sorted(done) if seed < given.sets]
    print(
        f"{len(rows)} of {given.sets} sets of 20 images of 8 patients, pure noise, 4 folds, {time.perf_counter() - began:.0f} s"
    )
    if len(rows) > 1:
        print(f"pairs within folds (medtl crossval)  mean AUC {mean_of([row['auc'] for row in rows])}")
        print(f"raw scores across folds              mean AUC {mean_of([row['pooled'] for row in rows])}")


if __name__ == "__main__":
    main()
