"""Sets for the tests of the audit: images that share a look, as X-rays do, and differ in texture; copies on demand."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import Dataset
from medtl_dist.data.sources import Columns


def texture(number: int, size: int = 96) -> np.ndarray:
    """uint8 [size, size]: dark lungs in a bright body, the same for all, under a texture of its own."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    look = 60 + 90 * np.exp(-(x**2) / 0.5) - 70 * np.exp(-((np.abs(x) - 0.45) ** 2) / 0.04 - y**2 / 0.3) + 25 * y
    for sigma, strength in ((12, 30), (5, 22), (2, 14)):
        noise = cv2.GaussianBlur(rng.standard_normal((size, size)), (0, 0), sigma)
        look = look + strength * noise / noise.std()
    return np.clip(look, 1, 254).astype(np.uint8)


class Entry(NamedTuple):
    """One image of a table. ``age``: a kept column."""

    image: np.ndarray
    patient: str
    split: str
    label: str = "normal"
    age: int = 50


def base(count: int = 80) -> list[Entry]:
    """Different images, two classes, two splits, a patient each."""
    return [
        Entry(
            texture(i), f"Doe-{i}", ("train", "test", "train", "val")[i % 4], ("normal", "sick")[i // 4 % 2], 40 + i % 7
        )
        for i in range(count)
    ]


def write_entries(folder: Path, entries: Iterable[Entry]) -> Path:
    """PNG files and ``labels.csv``; returns the table's path."""
    (folder / "images").mkdir(parents=True)
    with (folder / "labels.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("file", "label", "patient", "split", "age"))
        for number, entry in enumerate(entries):
            name = f"images/{entry.patient}-{number:04d}.png"
            cv2.imwrite(str(folder / name), entry.image)
            rows.writerow((name, entry.label, entry.patient, entry.split, entry.age))
    return folder / "labels.csv"


def pack_entries(folder: Path, entries: Iterable[Entry], name: str = "set", workers: int = 1) -> Dataset:
    """The entries as a packed set at ``folder/name``; a key of its own, always the same."""
    (folder / "key").write_text("07" * 32)
    table = write_entries(folder / f"{name}-source", entries)
    columns = Columns(label="label", group=("patient",), split="split", keep=("age",))
    options = PackOptions(columns=columns, num_workers=workers, key_file=folder / "key", positive="sick")
    return pack(table, folder / name, options)
