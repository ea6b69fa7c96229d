"""Made-up radiographs ─► images + labels.csv: a deterministic picture set for ``medtl demo`` and for tests.

Two soft dark lung fields on a bright chest; in class OPACITY one or two wide, soft bright patches lie inside the lungs.
Nothing else may tell the classes apart: everything else is drawn without looking at the label, a patch *moves*
brightness within the lung fields instead of adding it (the rest of the lungs gets darker by as much), and the contrast
is brought back to what it was, so the mean of the image, of its border and the contrast carry next to no information.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from medtl_dist.errors import UserError

CLASSES = ("NORMAL", "OPACITY")
DOMAINS = ("source", "target")
COLUMNS = ("file", "label", "patient_id", "domain", "view")
MIN_PATIENTS = 8
MIN_SIZE_PX = 32

Plane = NDArray[np.floating]

# (centre x, centre y) of the right and the left lung in a frame that runs from -1 to 1; x grows to the viewer's right,
# where the patient's left side is.
_LUNGS = ((-0.38, -0.08), (0.40, -0.06))


class _Scanner(NamedTuple):
    """How a domain shows brightness x in [0, 1]: black + contrast · x^gamma + noise, in a frame of one grey."""

    black: float
    contrast: float
    gamma: float
    noise: float  # standard deviation per pixel
    frame_width: tuple[float, float]  # least and greatest, in image widths
    frame_value: float


# By domain. The source: full contrast, little noise, a thin black frame. The target: a flat and dark curve, more noise, a wide
# grey frame.
_SCANNERS = (
    _Scanner(black=0.0, contrast=1.0, gamma=1.0, noise=0.015, frame_width=(0.0, 0.03), frame_value=0.02),
    _Scanner(black=0.12, contrast=0.62, gamma=1.3, noise=0.035, frame_width=(0.03, 0.07), frame_value=0.25),
)


@dataclass(frozen=True)
class _Patient:
    """One row of the plan: who the patient is; ``label`` and ``domain`` index CLASSES and DOMAINS."""

    name: str
    label: int
    domain: int
    num_images: int
    seed: tuple[int, int]


@dataclass(frozen=True)
class _Anatomy:
    """The patient's body, the same in every view. Lengths are in half image widths, brightness in [0, 1]."""

    lung_width: float
    lung_height: float
    lung_darkness: float
    lung_tilt: float
    chest_width: float
    heart_width: float
    rib_phase: float
    rib_pitch: float
    patches: tuple[tuple[float, float, float, float], ...]  # centre x, centre y, radius, strength


def write_demo_images(folder: Path, *, num_patients: int, seed: int, image_size_px: int) -> Path:
    """Write grey PNG images of made-up patients and the table that names them; returns the table's path.

    ``folder/images/<patient>_<number>.png`` is uint8 [image_size_px, image_size_px]; ``folder/labels.csv`` has the columns
    ``file`` (relative to the folder), ``label`` (NORMAL | OPACITY), ``patient_id``, ``domain`` (source | target) and
    ``view`` (left | right: the side the patient is turned to). Patients have one to three images, all of one label
    and one domain, two images on average. Patients come in pairs of one NORMAL and one OPACITY with the same domain and
    the same number of images, so neither tells the label; the pairs are half source, half target. There is no
    split column: packing splits by patient. The same arguments (``seed`` is 0 or more) give the same bytes.

    Raises:
        UserError: the folder holds something already, or fewer than 8 patients or 32 px were asked for.
    """
    if num_patients < MIN_PATIENTS:
        raise UserError(
            f"num_patients is {num_patients}: the demo set needs at least {MIN_PATIENTS}, a pair or two per split"
        )
    if image_size_px < MIN_SIZE_PX:
        raise UserError(
            f"image_size_px is {image_size_px}: the lungs need at least {MIN_SIZE_PX} px, give a larger number"
        )
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"the folder {folder} is not empty: name a new one, the demo images must not mix with other files"
        )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, ...]] = []
    for patient in _plan(num_patients, seed):
        for number, (view, image) in enumerate(_draw_patient(patient, image_size_px)):
            file = f"images/{patient.name}_{number}.png"
            (folder / file).write_bytes(cv2.imencode(".png", image)[1].tobytes())
            rows.append((file, CLASSES[patient.label], patient.name, DOMAINS[patient.domain], view))
    table = folder / "labels.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([COLUMNS, *rows])
    return table


def _plan(num_patients: int, seed: int) -> list[_Patient]:
    """Who exists. Pairs differ in the label only; names are dealt at random, so their order says nothing."""
    rng = np.random.default_rng([seed, 0])
    num_pairs = -(-num_patients // 2)
    domains = rng.permutation(np.arange(num_pairs) % 2)
    counts = rng.permutation(np.arange(num_pairs) % 3) + 1
    names = rng.permutation(num_pairs * 2)
    patients = [
        _Patient(f"P{names[i]:05d}", i % 2, int(domains[i // 2]), int(counts[i // 2]), (seed, i + 1))
        for i in range(num_patients)
    ]
    return sorted(patients, key=lambda patient: patient.name)


def _draw_patient(patient: _Patient, size_px: int) -> list[tuple[str, NDArray[np.uint8]]]:
    """The patient's images with their views, uint8 [size, size] each; turned left and right in turn."""
    rng = np.random.default_rng(patient.seed)
    anatomy = _draw_anatomy(rng, patient.label)
    first_side = int(rng.integers(2))
    images = []
    for number in range(patient.num_images):
        side = (first_side + number) % 2
        exposed = _expose(_chest(anatomy, rng, side, size_px), rng)
        images.append((("left", "right")[side], _scan(exposed, _SCANNERS[patient.domain], rng)))
    return images


def _draw_anatomy(rng: Generator, label: int) -> _Anatomy:
    """A body; patches are drawn for every patient and kept for OPACITY, so both classes use the same random numbers."""
    patches = []
    for _ in range(2):
        x0, y0 = _LUNGS[int(rng.integers(2))]
        offset = rng.uniform(-0.09, 0.09), rng.uniform(-0.30, 0.35)
        patches.append((x0 + offset[0], y0 + offset[1], rng.uniform(0.16, 0.26), rng.uniform(0.30, 0.55)))
    num_patches = int(rng.integers(1, 3))
    return _Anatomy(
        lung_width=rng.uniform(0.25, 0.31),
        lung_height=rng.uniform(0.56, 0.66),
        lung_darkness=rng.uniform(0.36, 0.50),
        lung_tilt=rng.uniform(0.05, 0.16),
        chest_width=rng.uniform(0.84, 0.95),
        heart_width=rng.uniform(0.20, 0.30),
        rib_phase=rng.uniform(0, 2 * np.pi),
        rib_pitch=rng.uniform(8.0, 10.0),
        patches=tuple(patches[:num_patches]) if label else (),
    )


def _chest(anatomy: _Anatomy, rng: Generator, side: int, size_px: int) -> Plane:
    """The chest in one view, float [size, size], about 0 (air) to 1 (bone).

    A turn of the body narrows the lung on one side and shifts everything; each view is placed a little differently.
    """
    turn = rng.uniform(0.02, 0.08) * (1 if side else -1)
    angle, scale = rng.uniform(-0.06, 0.06), rng.uniform(0.95, 1.06)
    shift_x, shift_y = rng.uniform(-0.05, 0.05, size=2)
    axis = (np.arange(size_px, dtype=np.float32) * 2 + 1) / size_px - 1
    u, v = (axis[None, :] - shift_x) / scale, (axis[:, None] - shift_y) / scale
    x, y = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    shoulders = 0.12 * np.clip(y + 0.55, -0.6, 0) / 0.6
    chest = _soft(anatomy.chest_width + shoulders - np.abs(x), 0.05) * _soft(y + 0.93, 0.06)
    lungs = np.zeros((size_px, size_px), np.float32)
    for (x0, y0), outward in zip(_LUNGS, (-1, 1), strict=True):
        dx = (x - x0 - turn - outward * anatomy.lung_tilt * (y - y0)) / (anatomy.lung_width * (1 + outward * turn * 2))
        radius = np.sqrt(dx**2 + (np.abs(y - y0) / anatomy.lung_height) ** 2 + 1e-6)
        lungs = np.maximum(lungs, _soft(1 - radius, 0.09))
    spine = np.exp(-(((x - turn / 2) / 0.09) ** 2))
    heart = np.exp(-(((x - 0.12 - turn) / anatomy.heart_width) ** 2) - ((y - 0.28) / 0.30) ** 2)
    ribs = np.sin(anatomy.rib_pitch * 2 * (y - 0.35 * x**2) + anatomy.rib_phase) * _soft(0.8 - np.abs(y + 0.1), 0.1)
    lungs = lungs * (1 - 0.75 * heart)
    patches = _patches(anatomy, x - turn, y, lungs)
    healthy = chest * (0.62 + 0.14 * spine + 0.10 * heart + 0.035 * ribs) - lungs * anatomy.lung_darkness
    image = healthy + patches
    # The whole image keeps the contrast it would have without patches, or the standard deviation would tell the label.
    return healthy.mean() + (image - healthy.mean()) * (healthy.std() / image.std())


def _patches(anatomy: _Anatomy, x: Plane, y: Plane, lungs: Plane) -> Plane:
    """The opacity in the lungs, with a mean of zero over the image: what a patch adds, the rest of the lungs loses."""
    total = np.zeros_like(lungs)
    for x0, y0, radius, strength in anatomy.patches:
        total = np.maximum(total, strength * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * radius**2)))
    total = total * lungs
    return total - lungs * (total.sum() / lungs.sum())


def _soft(distance: Plane, width: float) -> Plane:
    """A soft step: 0 where the distance is well below zero, 1 well above, over about ``width``."""
    return 0.5 * (1 + np.tanh(distance / width))


def _expose(image: Plane, rng: Generator) -> Plane:
    """Exposure varies from image to image by more than anything that the anatomy does to the mean."""
    return 0.5 + rng.uniform(0.80, 1.15) * (image - 0.42) + rng.uniform(-0.10, 0.10)


def _scan(image: Plane, scanner: _Scanner, rng: Generator) -> NDArray[np.uint8]:
    """What the scanner makes of an exposed image, uint8 [size, size]."""
    size = image.shape[0]
    shown = scanner.black + scanner.contrast * np.clip(image, 0, 1) ** scanner.gamma
    shown = shown + scanner.noise * rng.standard_normal((size, size), dtype=np.float32)
    frame = round(rng.uniform(*scanner.frame_width) * size)
    inside = np.zeros((size, size), bool)
    inside[frame : size - frame, frame : size - frame] = True
    return np.rint(np.clip(np.where(inside, shown, scanner.frame_value), 0, 1) * 255).astype(np.uint8)
