"""A small table of several labels an image, with unknown ones, beside its images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from image_folders import write_image

CLASSES = ("Mass", "Effusion", "Nodule")


def label_sets_of(num_images: int) -> np.ndarray:
    """int8 [num_images, 3], a third of the entries unknown (-1), none of the rows wholly."""
    rng = np.random.default_rng(7)
    sets = (rng.random((num_images, 3)) < (0.5, 0.4, 0.25)).astype(np.int8)
    unknown = rng.random(sets.shape) < 0.33
    unknown[unknown.all(axis=1), 0] = False
    sets[unknown] = -1
    return sets


def write_label_table(root: Path, num_images: int = 48, *, patients: int = 16, splits: tuple[str, ...] = ()) -> Path:
    """``labels.csv``: file, a column per class of 0, 1 or nothing, patient_id, site, split (by patient, in turn)."""
    lines = [f"file,{','.join(CLASSES)},patient_id,site,split"]
    for number, labels in enumerate(label_sets_of(num_images).tolist()):
        write_image(root / "images" / f"Doe-{number:04d}.png", number)
        cells = ",".join("" if value == -1 else str(value) for value in labels)
        patient = number % patients
        split = splits[patient % len(splits)] if splits else ""
        lines.append(f"images/Doe-{number:04d}.png,{cells},Doe-{patient},{'NS'[patient % 2]},{split}")
    path = root / "labels.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
