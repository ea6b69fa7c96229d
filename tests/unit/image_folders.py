"""Small image folders and tables for the tests of packing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, number: int, *, size: tuple[int, int] = (40, 30), color: bool = False) -> Path:
    """A smooth image of ``size`` (width, height), another for each number; grey, or in colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = (127 + 100 * np.sin(x / 7 + number) * np.cos(y / 5 + number)).astype(np.uint8)
    if color:
        pixels = np.stack([pixels, 255 - pixels, pixels // 2], axis=-1)
    Image.fromarray(pixels).save(path)
    return path


def write_folder(root: Path, num_images: int = 24, classes: tuple[str, ...] = ("normal", "sick")) -> Path:
    """``num_images`` images, the classes in turn, named as if by patient."""
    for number in range(num_images):
        label = classes[number % len(classes)]
        write_image(root / label / f"Doe-{number:04d}.png", number)
    return root


def write_table(root: Path, num_images: int = 24, *, patients: int = 8, splits: tuple[str, ...] = ()) -> Path:
    """``labels.csv`` with columns file, label, patient_id, split, age beside its images; ids start again per split."""
    lines = ["file,label,patient_id,split,site,age"]
    for number in range(num_images):
        split = splits[number % len(splits)] if splits else ""
        patient = number // max(1, len(splits)) % patients
        label = ("normal", "sick")[(number // max(1, len(splits))) % 2]
        write_image(root / "images" / f"Doe-{number:04d}.png", number)
        lines.append(f"images/Doe-{number:04d}.png,{label},Doe-{patient},{split},{'NS'[number // 3 % 2]},{20 + number}")
    path = root / "labels.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
