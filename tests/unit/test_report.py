"""The report: what it says, that it says it in every corner case, and that nothing in a run folder can break out of it."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_run import scored_split, write_run
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from medtl_dist.errors import DataError, UserError
from medtl_dist.metrics.ranking import average_precision, pr_curve
from medtl_dist.report import build, charts, flow, record, schema, svg, wording
from medtl_dist.report.build import build_report

# Shrinking a page that takes 0.1 s would take minutes; a name that breaks it is readable as it is.
UNSHRUNK = (Phase.explicit, Phase.generate)
VOID = {"meta", "line", "path", "rect", "circle"}  # our SVG closes its own; the parser sees them as start-end tags


class Page(html.parser.HTMLParser):
    """What a browser would find: elements in order, attributes, visible text, the style and the policy."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.style = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.style += data
        elif data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def attribute(self, tag: str, name: str) -> list[str]:
        return [value or "" for element, key, value in self.attributes if (element, key) == (tag, name)]


def page_of(folder: Path) -> Page:
    return Page(build_report(folder).read_text(encoding="utf-8"))


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def rewrite(folder: Path, results: dict[str, Any]) -> Path:
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "pneumonia-1")


@pytest.fixture(scope="module")
def binary_page(binary: Path) -> Page:
    return page_of(binary)


@pytest.fixture
def copy(binary: Path, tmp_path: Path) -> Path:
    """The binary run once more, to be changed."""
    for name in ("config.yaml", "results.json", "history.parquet"):
        (tmp_path / name).write_bytes((binary / name).read_bytes())
    return tmp_path


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


# ---- self-contained and safe


def test_page_is_self_contained(binary_page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(binary_page.tags)
    assert not {"src", "href", "style", "action", "srcset", "data"} & {name for _, name, _ in binary_page.attributes}
    assert not [name for _, name, _ in binary_page.attributes if name.startswith("on")]
    assert re.search(r"url\(|@import", binary_page.style) is None


def test_policy_lets_in_this_style_and_nothing_else(binary_page: Page) -> None:
    (policy,) = (value for value in binary_page.attribute("meta", "content") if "default-src" in value)
    digest = base64.b64encode(hashlib.sha256(binary_page.style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert "script-src" not in policy


hostile = st.one_of(
    st.text(min_size=1, max_size=40),
    st.sampled_from(
        [
            "<script>alert(1)</script>",
            "</title></style></svg><script>alert(1)</script>",
            '"><img src=x onerror=alert(1)>',
            "' onmouseover='alert(1)",
            "{{ 7 * 7 }}{% raw %}",
            "{0.__class__}",
            "<!--",
            "]]>",
            "&lt;b&gt;",
            "\u202egnp.exe",
            "\ud800",
            "\x00\x1b[31m",
            "x" * 400,
        ]
    ),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("small"), num_patients=(12, 12), epochs=2, num_bootstrap=20)


def renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def small_tags(small: Path) -> list[str]:
    return page_of(small).tags


@settings(deadline=None, max_examples=25, phases=UNSHRUNK)
@given(first=hostile, second=hostile)
def test_no_name_can_change_the_structure_of_the_page(
    small: Path, small_tags: list[str], first: str, second: str
) -> None:
    raw = renamed(results_of(small), {"NORMAL": first, "PNEUMONIA": second})
    for place, key in (("model", "backbone"), ("data", "name"), ("model", "weights"), ("provenance", "commit")):
        raw[place][key] = f"a {second}"
    raw["run"], raw["cautions"] = first, [f"a {second}"]
    results = schema.Results.model_validate(record.clean(raw))
    source = build.render(record.Record(results, record.read_run(small).history, record.clean(first + second)))
    source.encode("utf-8")
    page = Page(source)
    assert page.tags == small_tags or record.clean(first) == record.clean(second)
    assert {name for _, name, _ in page.attributes if name.startswith("on")} == set()
    heading = source.split("<h1>")[1].split("</h1>")[0]
    assert html.unescape(heading) == record.clean(first)


def test_what_cannot_be_shown_safely_is_replaced() -> None:
    assert record.clean({"a\x00": ["\u202egnp", "\ud800", "é ٣ \u200d", 1]}) == {
        "a\ufffd": ["\ufffdgnp", "\ufffd", "é ٣ \u200d", 1]
    }


# ---- errors


def test_what_is_not_a_run_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        build_report(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        build_report(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"has no results\.json: .* --resume"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "results.json is damaged"),
        (b"\xff\xfe", "results.json is damaged"),
        (b"[]", "an object was expected"),
        (b'{"schema_version": 1, "auc": NaN}', "NaN is not JSON"),
        (b'{"schema_version": 2}', "schema version 2; this medtl reads version 1"),
        (b"{}", "schema version None"),
        (b'{"schema_version": 1}', r"damaged \(run: Field required\)"),
    ],
)
def test_damaged_results_name_the_file_and_what_is_wrong(copy: Path, content: bytes, message: str) -> None:
    (copy / "results.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_report(copy)
    assert not (copy / "report.html").exists()


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("splits", "test", "auc"), "high", "splits.test.auc"),
        (("splits", "test", "auc_ci"), [0.5], "splits.test.auc_ci.1"),
        (("splits", "test", "curves", "roc", "fpr"), [0.0], "splits.test.curves.roc"),
        (("splits", "test", "histogram", "positive"), [1], "splits.test.histogram"),
        (("splits", "test", "confusion"), [[1]], "splits.test.confusion"),
        (("splits",), {}, "splits"),
        (("classes",), ["A"], "classes"),
    ],
)
def test_a_wrong_value_is_named(copy: Path, path: tuple[str, ...], value: object, place: str) -> None:
    results = results_of(copy)
    inner = results
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(DataError, match=re.escape(place)):
        build_report(rewrite(copy, results))


def test_damaged_history_is_named(copy: Path) -> None:
    whole = (copy / "history.parquet").read_bytes()
    (copy / "history.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"history.parquet is damaged"):
        build_report(copy)
    pq.write_table(pa.table({"epoch": [0]}), copy / "history.parquet")
    with pytest.raises(DataError, match="no column train_loss, val_loss, val_auc"):
        build_report(copy)
    (copy / "history.parquet").unlink()
    with pytest.raises(DataError, match=r"history.parquet is missing"):
        build_report(copy)


def test_damaged_config_is_named(copy: Path) -> None:
    (copy / "config.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"config.yaml is damaged"):
        build_report(copy)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from leaves(item, (*path, key))


@settings(deadline=None, max_examples=40, phases=UNSHRUNK)
@given(data=st.data(), value=st.sampled_from([None, "", "x", -1, 0, 1.5, 1e300, True, [], {}, [[]], {"a": None}]))
def test_a_wrong_value_anywhere_is_reported_or_drawn_but_never_a_crash(
    small: Path, data: st.DataObject, value: Any
) -> None:
    results = results_of(small)
    path = data.draw(st.sampled_from(list(leaves(results))))
    inner = results
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    try:
        found = schema.Results.model_validate(record.clean(results))
    except ValueError:
        return
    page = Page(build.render(record.Record(found, record.read_run(small).history, "")))
    assert not [v for tag, _, v in page.attributes if tag in VOID and re.search(r"\bnan\b|\binf\b", v or "")]


def test_unknown_keys_of_a_newer_tool_are_ignored(copy: Path) -> None:
    before = build_report(copy).read_bytes()
    results = results_of(copy)
    results["new"] = {"a": 1}
    results["splits"]["test"]["new"] = 1
    assert build_report(rewrite(copy, results)).read_bytes() == before


def test_report_is_repeatable_and_replaced_whole(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_report(copy).read_bytes()
    assert build_report(copy).read_bytes() == first

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    rewrite(copy, results_of(copy) | {"run": "another"})
    with pytest.raises(UserError, match=r"report.html can't be written \(No space left on device\)"):
        build_report(copy)
    assert (copy / "report.html").read_bytes() == first
    assert sorted(file.name for file in copy.iterdir()) == [
        "config.yaml",
        "history.parquet",
        "report.html",
        "results.json",
    ]


def test_command_prints_the_path(copy: Path) -> None:
    import typer

    from medtl_dist.cli.report import report

    app = typer.Typer()
    app.command()(report)
    done = CliRunner().invoke(app, [str(copy)])
    assert done.exit_code == 0
    assert done.output.strip().replace("\n", "") == str(copy / "report.html")


# ---- numbers in words


@given(value=st.one_of(st.floats(0, 1), st.floats(0.999, 1), st.floats(0, 1e-3)))
def test_rounding_never_claims_certainty(value: float) -> None:
    assert (wording.decimals(value) == "1.000") == (value == 1)
    assert (wording.decimals(value) == "0.000") == (value == 0)
    assert (wording.percent(value) == "100.0%") == (value == 1)
    assert (wording.percent(value) == "0.0%") == (value == 0)


@given(auc=st.floats(0.5, 1))
def test_pairs_never_claim_all_unless_all(auc: float) -> None:
    base, right, _ = wording.pair_counts(auc, None)
    if auc < 1 - 1e-6:
        assert right != base
    pairs = int(base.replace(",", ""))
    # Rounded to a whole pair; 1e-9 of one for the float that stands exactly between two, as 0.875.
    assert abs(int(right.replace(",", "")) - auc * pairs) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (wording.decimals(None), "–"),
        (wording.decimals(0.9996), ">\u00a00.999"),
        (wording.decimals(1.5), "1.500"),
        (wording.percent(0.99996), ">\u00a099.9%"),
        (wording.interval((0.1, 1.0)), "0.100 to 1.000"),
        (wording.duration(4.26), "4.3\u00a0s"),
        (wording.duration(59.6), "1\u00a0min 0\u00a0s"),
        (wording.duration(7265), "2\u00a0h 1\u00a0min"),
        (wording.moment("2026-03-12T15:05:22+01:00"), "12 March 2026, 14:05 UTC"),
        (wording.moment("yesterday"), "yesterday"),
        (wording.plural(1, "image"), "1\u00a0image"),
        (wording.plural(1200, "class"), "1,200\u00a0classes"),
        (wording.pair_counts(0.9971, (0.99, 0.9999)), ("1,000", "997", "990 to 1,000")),
        (wording.rule("sensitivity >= 0.95"), "the highest score that reached sensitivity ≥ 0.95"),
    ],
)
def test_wording(said: object, expected: object) -> None:
    assert said == expected


# ---- charts


@given(low=st.floats(-5, 5), span=st.floats(1e-4, 1e4))
def test_ticks_are_round_distinct_and_inside(low: float, span: float) -> None:
    axis = svg.linear_axis(low, low + span, "x", max_ticks=6)
    values, labels = [value for value, _ in axis.ticks], [label for _, label in axis.ticks]
    assert len(set(labels)) == len(labels)
    assert 1 <= len(labels) <= 8
    assert all(low - span * 1e-6 <= value <= low + span * (1 + 1e-6) for value in values)
    assert all(abs(float(label) - value) <= span * 1e-6 for value, label in axis.ticks)


@given(seed=st.integers(0, 2**16))
def test_area_under_the_drawn_pr_steps_is_the_average_precision(seed: int) -> None:
    split = scored_split((6, 5), seed=seed, skill=1.0)
    labels, scores = np.asarray(split["labels"]) == 1, np.asarray(split["logits"])[:, 1]
    curve = pr_curve(labels, scores)
    assert curve is not None
    steps = charts._stairs(curve.x.tolist(), curve.y.tolist())
    area = sum((x1 - x0) * y1 for (x0, _), (x1, y1) in pairwise(steps))
    assert area == pytest.approx(average_precision(labels, scores), abs=1e-12)


def _points(source: str) -> Iterator[tuple[float, float]]:
    for d in re.findall(r' d="M([^"]*)"', source):
        for point in d.split(" L"):
            x, y = point.split()
            yield float(x), float(y)


@settings(deadline=None, max_examples=30)
@given(
    values=st.lists(st.one_of(st.none(), st.floats(0, 50)), min_size=1, max_size=60),
    best=st.one_of(st.none(), st.integers(-2, 70)),
)
def test_learning_curves_stay_in_their_frame(values: list[float | None], best: int | None) -> None:
    told = svg.Told("a", "b", "c")
    drawn = charts.learning_chart(told, list(range(1, len(values) + 1)), [("loss", values)], best, y_name="Loss")
    assert all(0 <= x <= 460 and 0 <= y <= 330 for x, y in _points(drawn))
    placed = [float(value) for value in re.findall(r' (?:c?[xy]|[xy][12])="([^"]*)"', drawn)]
    assert all(0 <= value <= 460 for value in placed)


def test_learning_auc_axis_ends_at_one() -> None:
    drawn = charts.learning_chart(
        svg.Told("a", "b", "c"),
        [1, 2],
        [("auc", [1.0, 1.0])],
        1,
        y_name="AUC",
        ceiling=1.0,
        best_label=wording.decimals,
    )
    ticks = [float(tick) for tick in re.findall(r'class="tick">([\d.]+)<', drawn.split("axis-name")[0])]
    assert max(tick for tick in ticks if tick not in (1.0, 2.0) or tick == 1.0) <= 1.0
    assert "best epoch 1: 1.000" in drawn


def test_known_points_fall_where_they_belong() -> None:
    frame = svg.Frame(svg.share_axis("x"), svg.share_axis("y"))
    drawn = charts.roc_chart(svg.Told("a", "b", "c"), [charts.Curve("c", [0, 0.5, 1], [0, 1, 1])], None)
    assert list(_points(drawn)) == [
        pytest.approx((frame.at_x(x), frame.at_y(y)), abs=0.06) for x, y in ((0, 0), (0.5, 1), (1, 1))
    ]
