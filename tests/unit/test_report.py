"""The report: what it says, and that it says it in every corner case."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_run import write_run

# Shrinking a page that takes 0.1 s would take minutes; a name that breaks it is readable as it is.
from html_page import VOID, Page, copied_run, page_of, results_of, rewrite

from medtl_dist.report import flow, schema
from medtl_dist.report.build import build_report


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "pneumonia-1")


@pytest.fixture(scope="module")
def binary_page(binary: Path) -> Page:
    return page_of(binary)


@pytest.fixture
def copy(binary: Path, tmp_path: Path) -> Path:
    return copied_run(binary, tmp_path)


# ---- what it says


def test_headline_is_the_test_split_with_its_interval_and_how_it_was_made(binary: Path, binary_page: Page) -> None:
    entry = results_of(binary)["splits"]["test"]
    low, high = entry["auc_ci"]
    text = binary_page.text
    assert "Result on the test split" in text
    assert f"{entry['auc']:.3f}" in text
    assert f"95% interval {low:.3f} to {high:.3f}" in text
    assert f"in about {round(entry['auc'] * 100)} (95% interval: {round(low * 100)} to {round(high * 100)})" in text
    assert "one image with PNEUMONIA and one without" in text
    assert "patient-clustered DeLong (Obuchowski), logit scale" in text
    assert f"{entry['n']} images of {entry['n_groups']} patients" in text.replace("\u00a0", " ")


def test_the_threshold_its_counts_and_the_prevalence_are_in_words(binary: Path, binary_page: Page) -> None:
    entry = results_of(binary)["splits"]["test"]
    (tn, fp), (fn, tp) = entry["confusion"]
    text = binary_page.text.replace("\u00a0", " ")
    assert f"A score of {entry['threshold']['value']:.3f} or more counts as PNEUMONIA" in text
    assert f"Of {tp + fn} images with PNEUMONIA, {tp} were recognised and {fn} missed" in text
    assert f"Of {tn + fp} images without, {tn} were passed and {fp} falsely flagged" in text
    assert f"sensitivity {entry['sensitivity']['value'] * 100:.1f}%" in text
    assert f"holds where {entry['prevalence'] * 100:.1f}% have PNEUMONIA" in text


def test_validation_and_patients_stand_beside_the_headline(binary: Path, binary_page: Page) -> None:
    splits = results_of(binary)["splits"]
    for split in ("test", "val"):
        for entry in (splits[split], splits[split]["other_level"]):
            assert f"{entry['auc']:.3f}" in binary_page.texts
    for heading in ("Test, by image", "Test, by patient", "Validation, by image", "Validation, by patient"):
        assert heading in binary_page.texts


@pytest.mark.parametrize(
    "title",
    [
        "ROC curve",
        "Precision-recall curve",
        "Histogram of scores by class",
        "Calibration plot",
        "Loss by epoch",
        "Validation AUC by epoch",
    ],
)
def test_every_figure_is_there_named_and_described(binary_page: Page, title: str) -> None:
    assert title in binary_page.texts
    ids = binary_page.attribute("title", "id") + binary_page.attribute("desc", "id")
    assert len(set(ids)) == len(ids)
    named = " ".join(binary_page.attribute("svg", "aria-labelledby")).split()
    assert sorted(named) == sorted(ids)


def test_headings_go_down_one_level_at_a_time(binary_page: Page) -> None:
    levels = [int(tag[1]) for tag in binary_page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_epochs_are_counted_from_1_and_the_best_is_marked(binary: Path, binary_page: Page) -> None:
    best = results_of(binary)["best_epoch"]
    auc = pq.read_table(binary / "history.parquet").column("val_auc")[best].as_py()
    assert f"best epoch {best + 1}: {auc:.3f}" in binary_page.texts
    assert f"{best + 1} (best)" in binary_page.texts


def test_config_and_provenance_are_complete(binary: Path, binary_page: Page) -> None:
    results = results_of(binary)
    for line in (binary / "config.yaml").read_text().splitlines():
        assert line.strip() in binary_page.text
    for value in (results["provenance"]["commit"], results["data"]["sha256"], results["provenance"]["config_sha256"]):
        assert value in binary_page.texts
    assert "torch 2.14.1" in binary_page.text


def test_flow_adds_up_and_says_what_was_left_out(binary: Path, binary_page: Page) -> None:
    data = results_of(binary)["data"]
    used = sum(split["samples"] for split in data["splits"].values())
    text = binary_page.text.replace("\u00a0", " ")
    assert f"Found {data['found']:,} images" in text
    assert "Left out 11 images label missing 7 unreadable image 4" in text
    assert f"In the data set {used:,} images" in text
    assert data["found"] == used + 11


def test_flow_shows_images_that_nobody_accounts_for() -> None:
    data = schema.Data.model_validate(
        {
            "group_source": "column p",
            "found": 30,
            "excluded": [{"reason": "unreadable", "samples": 4}],
            "splits": {"train": {"samples": 20, "groups": 9}, "val": {"samples": 5, "groups": 3}},
        }
    )
    shown = flow.flow(data)
    assert shown.left_out is not None
    assert shown.left_out.lines == [("unreadable", "4"), ("not accounted for", "1")]
    assert shown.left_out.images.split() == ["5", "images"]
    assert shown.kept.patients.split() == ["12", "patients"]


def test_val_only_run_says_so_and_that_it_is_optimistic(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, test=False))
    assert "Result on the validation split" in page.texts
    assert "Validation, not test." in page.texts
    assert "Result on the test split" not in page.text


def test_unknown_patients_are_not_counted_as_patients(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, known_patients=False))
    assert "Independent images assumed." in page.texts
    assert re.search(r"\d patients", page.text.replace("\u00a0", " ")) is None


def test_patient_unit_speaks_of_patients(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, unit="patient"))
    assert "one patient with PNEUMONIA and one without" in page.text
    assert "the score is the mean of the scores of the patient’s images" in page.text


def test_cautions_come_from_the_facts_and_are_said_once(copy: Path) -> None:
    results = results_of(copy)
    results["model"]["weights"] = "random initial weights"
    results["splits"]["test"]["ci_warning"] = "unreliable: 6 positive patients (fewer than 10)"
    results["cautions"] = [
        "Random initial weights: nothing was transferred.",
        "Trained with class weights: scores are not calibrated until corrected on val.",
    ]
    page = page_of(rewrite(copy, results))
    said = [text for text in page.texts if text.endswith(".")]
    assert said.count("Random initial weights.") == 1
    assert "nothing was transferred" not in page.text
    assert "Trained with class weights. Scores are not calibrated until corrected on validation." in page.text
    assert "Unreliable interval (test, by image). 6 positive patients" in page.text
    assert "Test split scored 3 times, by 2\u00a0configurations." in page.texts


def test_a_warning_of_many_classes_is_shortened_and_said_once_for_both_units(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, classes=MANY, num_patients=[8] * 9))
    cautions = page.text.split("Read with care")[1].split("Which classes")[0]
    assert cautions.count("Unreliable interval") == 1
    assert "Unreliable interval (test, by image and by patient). 8 positive patients for class No finding" in cautions
    assert "and 7 more, see each class" in cautions


def test_first_opening_of_the_test_split_is_no_caution(copy: Path) -> None:
    results = results_of(copy)
    results["test_openings"] = {"count": 1, "configurations": 1}
    page = page_of(rewrite(copy, results))
    assert not [text for text in page.texts if text.startswith("Test split scored once")]
    assert "once, by 1\u00a0configuration" in page.texts


def test_patients_with_mixed_labels_are_listed(copy: Path) -> None:
    results = results_of(copy)
    results["splits"]["test"]["mixed_label_groups"] = {"count": 7, "groups": [f"g{i}" for i in range(7)]}
    text = page_of(rewrite(copy, results)).text.replace("\u00a0", " ")
    assert "In the test split 7 patients have images of more than one class: g0, g1, g2, g3, g4 …." in text


# ---- corner cases


def test_undefined_auc_is_called_undefined_with_the_reason(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, num_patients=(0, 40)))
    assert "undefined" in page.texts
    assert "The AUC is undefined: no negative images" in page.text
    assert "95% interval" not in page.text.split("Read with care")[0]


def test_perfect_auc_is_all_of_the_pairs(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, num_patients=(40, 40), skill=60))
    assert "in all 100 (95% interval: 93 to 100)" in page.text
    assert "No error was seen" in page.text


def test_one_epoch_and_no_defined_auc_still_draw(tmp_path: Path) -> None:
    folder = write_run(tmp_path, epochs=1)
    table = pq.read_table(folder / "history.parquet")
    nothing = pa.array([None], pa.float64())
    pq.write_table(
        table.set_column(table.schema.get_field_index("val_auc"), "val_auc", nothing), folder / "history.parquet"
    )
    page = page_of(folder)
    assert "best epoch 1" in page.texts
    assert "undefined" in page.texts


def test_history_with_diverged_epochs_leaves_gaps(copy: Path) -> None:
    table = pq.read_table(copy / "history.parquet")
    losses = table.column("val_loss").to_pylist()
    losses[3:5] = [float("nan"), float("inf")]
    column = table.schema.get_field_index("val_loss")
    pq.write_table(table.set_column(column, "val_loss", pa.array(losses)), copy / "history.parquet")
    source = build_report(copy).read_text()
    assert re.search(r"\b(nan|inf)\b", source, re.IGNORECASE) is None


MANY = ["No finding", "Mass", "Nodule", "Oedema", "Fibrosis", "Hernia", "Effusion", "Emphysema", "Consolidation"]


@pytest.mark.parametrize("num_classes", [3, 9])
def test_each_of_several_classes_has_its_row(tmp_path: Path, num_classes: int) -> None:
    classes = [*MANY[: num_classes - 1], "A finding with a name that is far too long for the head of a narrow table"]
    folder = write_run(tmp_path, classes=classes, num_patients=[12] * (num_classes - 1) + [0])
    page = page_of(folder)
    per_class = results_of(folder)["splits"]["test"]["per_class"]
    for name in classes[:-1]:
        assert f"{per_class[name]['auc']:.3f}" in page.texts
    assert f"the {num_classes - 1} of {num_classes} classes present" in page.text
    assert (
        page.attribute("table", "class").count("confusion numbered") == (0 if num_classes == 3 else 2)
        or num_classes == 3
    )
    assert page.tags.count("svg") > num_classes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"test": False, "known_patients": False, "epochs": 1},
        {"num_patients": (0, 30)},
        {"classes": MANY[:3], "num_patients": (20, 20, 0)},
        {"classes": MANY, "num_patients": [8] * 9, "unit": "patient"},
        {"changes": {"data": {}, "model": {}, "training": {}, "provenance": {}, "throughput": {}, "timing_s": {}}},
        {"changes": {"best_epoch": None, "epochs_run": None, "test_openings": None, "cautions": []}},
    ],
)
def test_no_placeholder_of_a_program_reaches_the_reader(tmp_path: Path, options: dict[str, Any]) -> None:
    page = page_of(write_run(tmp_path, num_bootstrap=20, **options))
    config = (tmp_path / "config.yaml").read_text().strip()
    said = [text for text in page.texts if text != config]
    found = [text for text in said if re.search(r"\b(nan|inf|infinity|None|null)\b|[{}]", text)]
    assert not found
    coordinates = [value for tag, name, value in page.attributes if tag in VOID and name not in ("class", "content")]
    assert not [value for value in coordinates if re.search("nan|inf|None", value or "")]
