"""The demo set: repeatable, as its table says, and with no way to the label but the opacity itself."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medtl_dist.demo_data import CLASSES, COLUMNS, DOMAINS, _chest, _draw_anatomy, write_demo_images
from medtl_dist.errors import UserError

NUM_PATIENTS, SIZE_PX = 400, 48


class Written:
    """The set read back from the folder alone, as a stranger would."""

    def __init__(self, table: Path) -> None:
        with table.open(newline="", encoding="utf-8") as stream:
            self.rows = list(csv.DictReader(stream))
        self.images = [cv2.imread(str(table.parent / row["file"]), cv2.IMREAD_UNCHANGED) for row in self.rows]
        self.pixels = np.stack([image for image in self.images if image is not None]).astype(float)
        self.labels = np.array([CLASSES.index(row["label"]) for row in self.rows])
        self.domains = np.array([DOMAINS.index(row["domain"]) for row in self.rows])
        self.patients = np.array([row["patient_id"] for row in self.rows])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("demo") / "set"
    return Written(write_demo_images(folder, num_patients=NUM_PATIENTS, seed=3, image_size_px=SIZE_PX))


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Other patients, for scores that no fold's balance can bias (both sets have exactly half of each label)."""
    folder = tmp_path_factory.mktemp("demo") / "unseen"
    return Written(write_demo_images(folder, num_patients=NUM_PATIENTS, seed=4, image_size_px=SIZE_PX))


def linear_auc(describe: Callable[[Written], np.ndarray], written: Written, unseen: Written) -> float:
    """AUC on unseen patients of a logistic regression on some features."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(describe(written), written.labels)
    return float(roc_auc_score(unseen.labels, model.decision_function(describe(unseen))))


def brightness_and_border(data: Written) -> np.ndarray:
    edge = SIZE_PX // 12
    border = np.ones((SIZE_PX, SIZE_PX), bool)
    border[edge:-edge, edge:-edge] = False
    frame = data.pixels[:, border]
    return np.column_stack([data.pixels.mean((1, 2)), frame.mean(1), frame.std(1), data.domains])


def with_contrast(data: Written) -> np.ndarray:
    return np.column_stack([brightness_and_border(data), data.pixels.std((1, 2))])


def eight_by_eight(data: Written) -> np.ndarray:
    return np.stack([cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA).ravel() for image in data.pixels])


def test_same_arguments_same_bytes_and_another_seed_other_bytes(tmp_path: Path) -> None:
    def files(name: str, seed: int) -> dict[str, bytes]:
        write_demo_images(tmp_path / name, num_patients=9, seed=seed, image_size_px=32)
        return {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in sorted((tmp_path / name).rglob("*"))
            if path.is_file()
        }

    first = files("a", 0)
    assert first == files("b", 0)
    other = files("c", 1)
    assert not set(first.values()) & set(other.values())


def test_table_names_every_image_once_and_images_are_grey_squares(written: Written, tmp_path: Path) -> None:
    table = write_demo_images(tmp_path / "new" / "set", num_patients=8, seed=0, image_size_px=40)
    assert table == tmp_path / "new" / "set" / "labels.csv"
    again = Written(table)
    assert tuple(again.rows[0]) == COLUMNS
    on_disk = sorted(str(path.relative_to(table.parent)) for path in (table.parent / "images").iterdir())
    assert sorted(row["file"] for row in again.rows) == on_disk
    assert all(image is not None and image.dtype == np.uint8 for image in again.images)
    assert again.pixels.shape == (len(again.rows), 40, 40)
    assert len(np.unique(written.pixels, axis=0)) == len(written.rows), "two images are the same"


def test_a_patient_has_one_to_three_images_of_one_label_and_domain_with_alternating_views(written: Written) -> None:
    counts = Counter(written.patients.tolist())
    assert len(counts) == NUM_PATIENTS
    assert set(counts.values()) == {1, 2, 3}
    assert len(written.rows) == pytest.approx(2 * NUM_PATIENTS, abs=4)
    for patient in counts:
        own = [row for row in written.rows if row["patient_id"] == patient]
        assert len({(row["label"], row["domain"]) for row in own}) == 1
        views = [row["view"] for row in own]
        assert all(earlier != later for earlier, later in pairwise(views))
        assert set(views) <= {"left", "right"}


def test_patients_of_one_anatomy_look_alike(written: Written) -> None:
    """Images of a patient are correlated (so intervals must know patients): closer than images of two patients."""
    blurred = np.stack([cv2.resize(image, (12, 12), interpolation=cv2.INTER_AREA) for image in written.pixels])
    features = blurred.reshape(len(blurred), -1)
    features = (features - features.mean(1, keepdims=True)) / features.std(1, keepdims=True)
    same, other = [], []
    keys = list(zip(written.labels, written.domains, (row["view"] for row in written.rows), strict=True))
    for i in range(len(keys)):
        for j in range(i):
            if keys[i] == keys[j]:
                distance = float(np.linalg.norm(features[i] - features[j]))
                (same if written.patients[i] == written.patients[j] else other).append(distance)
    assert np.mean(same) < 0.8 * np.mean(other)


def test_label_is_independent_of_domain_image_count_and_order(written: Written) -> None:
    for patients_of in ("domains", "counts"):
        table: Counter[tuple[int, int]] = Counter()
        for patient in set(written.patients.tolist()):
            own = written.patients == patient
            value = int(written.domains[own][0]) if patients_of == "domains" else int(own.sum())
            table[value, int(written.labels[own][0])] += 1
        assert all(table[value, 0] == table[value, 1] > 0 for value, _ in table)
    order = np.arange(len(written.labels))
    assert abs(roc_auc_score(written.labels, order) - 0.5) < 0.1
    assert abs(roc_auc_score(written.labels, [row["view"] == "left" for row in written.rows]) - 0.5) < 0.1


@pytest.mark.parametrize("describe", [brightness_and_border, with_contrast])
def test_brightness_contrast_and_border_do_not_tell_the_label(
    written: Written, unseen: Written, describe: Callable[[Written], np.ndarray]
) -> None:
    """What a lazy classifier could use. The standard error of an AUC of chance is about .03 for 400 patients."""
    assert abs(linear_auc(describe, written, unseen) - 0.5) < 0.09


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_a_patch_changes_the_chest_but_neither_its_mean_nor_its_contrast(seed: int) -> None:
    ill = _draw_anatomy(np.random.default_rng(seed), label=1)
    with_patch, without = (_chest(body, np.random.default_rng(seed), 0, 64) for body in (ill, replace(ill, patches=())))
    assert np.abs(with_patch - without).max() > 0.1
    assert with_patch.mean() == pytest.approx(without.mean(), abs=1e-6)
    assert with_patch.std() == pytest.approx(without.std(), abs=1e-6)


def test_opacity_tells_the_label_at_low_frequency(written: Written, unseen: Written) -> None:
    """The signal is strong enough for a short training: even a linear model on 8 × 8 pixels finds most of it."""
    assert linear_auc(eight_by_eight, written, unseen) > 0.75


def test_domains_differ_in_contrast_and_noise(written: Written) -> None:
    source, target = (written.pixels[written.domains == domain] for domain in (0, 1))
    assert source.std((1, 2)).mean() > 1.5 * target.std((1, 2)).mean()
    blurred = [np.stack([cv2.GaussianBlur(image, (3, 3), 0) for image in images]) for images in (source, target)]
    noise = [
        np.abs(images - blur)[:, 16:32, 8:40].mean() for images, blur in zip((source, target), blurred, strict=True)
    ]
    assert noise[1] > 1.3 * noise[0]


@pytest.mark.parametrize(
    ("num_patients", "size_px", "message"),
    [(7, 64, "num_patients is 7: .* at least 8"), (8, 31, "31.* at least 32 px")],
)
def test_too_small_is_refused(tmp_path: Path, num_patients: int, size_px: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_demo_images(tmp_path, num_patients=num_patients, seed=0, image_size_px=size_px)
    assert not list(tmp_path.iterdir())


def test_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        write_demo_images(tmp_path, num_patients=8, seed=0, image_size_px=32)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
