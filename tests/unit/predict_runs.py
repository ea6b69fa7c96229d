"""A finished run of a tiny network on a packed set of made-up images, seconds in all: for the tests of what uses one."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from medtl_dist.config import Config, load_config
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.sources import Columns
from medtl_dist.run import Folder, LocalRun
from medtl_dist.train.loop import fit


def write_images(
    folder: Path,
    num_images: int = 48,
    *,
    classes: tuple[str, ...] = ("NORMAL", "SICK"),
    colour: bool = False,
    seed: int = 0,
) -> Path:
    """``folder/labels.csv`` (file, label, patient) and PNGs of several sizes, brighter in later classes; two images a patient."""
    rng = np.random.default_rng(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_images):
        patient = number // 2
        label = patient % len(classes)
        height, width = int(rng.integers(70, 100)), int(rng.integers(70, 100))
        y, x = np.mgrid[:height, :width]
        picture = 90 + 25 * label + 40 * np.sin(x / 9 + number) * np.cos(y / 7) + rng.normal(0, 14, (height, width))
        grey = np.clip(picture, 0, 255).astype(np.uint8)
        pixels = np.stack([grey, 255 - grey, np.roll(grey, 5, 1)], axis=-1) if colour else grey
        name = f"pictures/{number:03d}.png"
        cv2.imwrite(str(folder / name), pixels)
        rows.append({"file": name, "label": classes[label], "patient": f"P{patient}"})
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    return folder / "labels.csv"


def pack_table(table: Path, dest: Path, **options: object) -> Path:
    """The table as a set; ``options`` as of ``PackOptions``."""
    columns = Columns(label="label", group=("patient",))
    settings = {"columns": columns, "image_size_px": 72, "num_workers": 1, "fractions": (0.5, 0.25, 0.25)} | options
    pack(table, dest, PackOptions(**settings))  # pyright: ignore[reportArgumentType]
    return dest


def config_on(shards: Path, *overrides: str) -> Config:
    """Of an epoch of the tiny network; to be used within ``tiny_registered``."""
    return load_config(
        preset="smoke",
        overrides=[
            "model.backbone=tiny", f"data.shards={shards}", "train.threads=1", "train.epochs=1", "data.image_size_px=40",
            "evaluate.bootstrap_samples=20", *overrides,
        ],
    )  # fmt: skip


def train(shards: Path, folder: Path, *overrides: str) -> Path:
    """A finished run in ``folder``; call within ``tiny_registered``."""
    config = config_on(shards, *overrides)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    fit(config, LocalRun(Folder.local(folder)))
    return folder


def linkage(shards: Path) -> pd.DataFrame:
    """key (hex), file, row of each packed image."""
    table = pq.read_table(shards.with_name(f"{shards.name}.private") / "linkage.parquet").to_pandas()
    table["row"] = table["row"].fillna(-1).astype(int)
    if len(table) and isinstance(table.key.iloc[0], bytes):
        table["key"] = [key.hex() for key in table.key]
    return table
