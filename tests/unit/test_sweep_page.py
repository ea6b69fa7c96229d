"""The sweep's page: what it says, in every corner case; nothing in a sweep folder can break out of it, and no labels overlap."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from example_sweep import write_example, write_trials
from html_page import Page
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from medtl_dist.config import load_config
from medtl_dist.errors import DataError
from medtl_dist.report import sweep_charts
from medtl_dist.report.svg import Told
from medtl_dist.report.sweep_page import build_sweep_page
from medtl_dist.sweep.outcome import Epoch, Outcome
from medtl_dist.sweep.summary import read_summary, write_sweep
from medtl_dist.sweep.table import read_table
from tune_spaces.space import apply

UNSHRUNK = (Phase.explicit, Phase.generate)
TOLD = Told("ident", "title", "description")
HOSTILE = "</style></svg><script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("sweeps") / "pneumonia", num_trials=16, seed=3)


@pytest.fixture(scope="module")
def page(example: Path) -> Page:
    return page_of(example)


def page_of(folder: Path) -> Page:
    return Page(build_sweep_page(folder).read_text(encoding="utf-8"))


def words(page: Page) -> str:
    return page.text.replace("\u00a0", " ")


# ---- what it says


def test_the_winner_stands_beside_the_plain_best(example: Path, page: Page) -> None:
    content = read_summary(example)
    winner, best = content["winner"], content["best"]
    assert winner["trial"] != best["trial"], "the example should have two"
    text = words(page)
    for title, row in (("Winner", winner), ("Plain best", best)):
        assert f"{title}: trial {row['trial']}" in text
        assert f"{row['auc']:.3f}" in text
        assert f"95% interval {row['auc_ci'][0]:.3f} to {row['auc_ci'][1]:.3f}" in text
    assert f"Trial {winner['trial']} is the simplest of those within one standard error" in text
    assert "can’t be told apart from the plain best" in text


def test_all_trials_are_in_the_table_with_their_reasons(example: Path, page: Page) -> None:
    rows = re.findall(r"<tr[^>]*><th scope=\"row\">(\d+)</th>(.*?)</tr>", (example / "sweep.html").read_text())
    assert sorted(int(number) for number, _ in rows) == list(range(16))
    assert [int(number) for number, _ in rows][-2:] == [5, 7]  # those without a rank
    said = dict(rows)
    assert "checksum differs &lt;key&gt;; 2 starts" in said["5"]
    assert "not ranked" in said["5"]
    assert "the loss became NaN in epoch 1" in said["7"]
    assert "winner" in said[str(read_summary(example)["winner"]["trial"])]
    assert "asha: below the best third" in words(page)


def test_cautions_say_that_val_chose_and_what_the_interval_leaves_out(page: Page) -> None:
    text = words(page)
    assert "Chosen on val. Epoch and trial were picked on these images" in text
    assert "The interval leaves out the choice." in text
    assert "Optimistic by about" in text


@pytest.mark.parametrize(
    "title",
    ["AUC against learning rate", "Learning curves", "Which knob mattered", "How much of it is luck", "Every trial’s knobs",
     "All trials", "How the trials ended", "Time saved by the cache"],
)  # fmt: skip
def test_every_figure_and_table_is_there(page: Page, title: str) -> None:
    assert title in page.texts


def test_every_picture_is_told_and_every_id_is_its_own(page: Page) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) >= 10
    for value in page.attribute("svg", "aria-labelledby"):
        assert set(value.split()) <= set(ids)
    assert set(page.attribute("svg", "role")) == {"img"}


def test_the_command_trains_the_winner(example: Path, page: Page) -> None:
    command = next(text for text in page.texts if text.startswith("medtl train"))
    parts = shlex.split(command.replace("\\\n", " "))
    overrides = [value for option, value in itertools.pairwise(parts) if option == "--set"]
    found = load_config(file=example / "config.yaml", overrides=overrides)
    base = load_config(file=example / "config.yaml")
    assert found == apply(base, read_summary(example)["winner"]["overrides"]) != base


def test_the_page_is_self_contained_and_the_same_each_time(example: Path, page: Page) -> None:
    first = (example / "sweep.html").read_bytes()
    assert build_sweep_page(example).read_bytes() == first
    assert len(first) < 300_000
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in page.attribute("meta", "content")[0]
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name in ("style", "src", "href") or name.startswith("on")]
    used = {css for _, name, value in page.attributes if name == "class" for css in (value or "").split()}
    known = set(re.findall(r"\.([a-z][\w-]*)", page.style))
    assert {css for css in used if css.startswith(("shape-", "line-", "end-", "faint", "range", "ring"))} <= known


# ---- corner cases


def only(tmp_path: Path, outcomes: list[Outcome]) -> Page:
    write_sweep(tmp_path, outcomes)
    return page_of(tmp_path)


def a_trial(
    number: int, *aucs: float | None, state: Any = "finished", reason: str | None = None, **keys: Any
) -> Outcome:
    curve = tuple(Epoch(epoch, auc, 0.5, 0.6, 10.0) for epoch, auc in enumerate(aucs))
    whole = Outcome(
        number,
        {"optim.lr": 0.001 * (number + 1)},
        state,
        reason,
        curve,
        0,
        5,
        9.0,
        0.1,
        0.0,
        1,
        None,
        f"trials/{number:05d}",
    )
    return dataclasses.replace(whole, **keys)


def test_a_sweep_without_any_ranked_trial(tmp_path: Path) -> None:
    page = only(
        tmp_path, [a_trial(0, state="failed", reason="it broke"), a_trial(1, None), a_trial(2, state="waiting")]
    )
    text = words(page)
    assert "No trial has an AUC that could be ranked." in text
    assert "it broke" in text
    assert "medtl train" not in text


def test_a_sweep_of_one_trial_and_one_epoch(tmp_path: Path) -> None:
    text = words(only(tmp_path, [a_trial(0, 0.75)]))
    assert "Winner, and plain best: trial 0" in text
    assert "Which knob mattered can’t be said: too few trials: 1 ranked" in text
    assert "No trial used the cache" in text


def test_trials_without_scores_have_no_intervals_but_a_page(tmp_path: Path) -> None:
    text = words(only(tmp_path, [a_trial(n, 0.7, 0.7 + n / 100) for n in range(9)]))
    assert "Optimism unknown. No trial left its val scores" in text
    assert "How much of it is luck" not in text


def test_perfect_equal_and_zero_aucs(tmp_path: Path) -> None:
    for aucs in ((1.0, 1.0), (0.0, 0.0), (0.5, 1.0)):
        page = only(tmp_path, [a_trial(n, auc) for n, auc in enumerate(aucs)])
        assert "nan" not in words(page).lower()


def test_a_hostile_sweep_shows_as_text(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    outcomes = write_trials(folder, num_trials=9, epochs=2, num_patients=40, classes=("a", HOSTILE), faults=False)
    outcomes = [
        dataclasses.replace(one, reason=HOSTILE, overrides={**one.overrides, f"train.{HOSTILE}": f"{n} {HOSTILE}"})
        for n, one in enumerate(outcomes)
    ]
    page = only(folder, outcomes)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.tags.count("style") == 1
    assert HOSTILE in page.text


@pytest.mark.parametrize(
    "change", [{"ranking": 3}, {"best": {}}, {"knobs": {}}, {"optimism": None}, {"cost": {}}, {"states": []}]
)
def test_a_damaged_summary_is_an_error_of_the_data(example: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "sweep.parquet").write_bytes((example / "sweep.parquet").read_bytes())
    (tmp_path / "sweep.json").write_text(json.dumps(read_summary(example) | change))
    with pytest.raises(DataError, match=r"sweep\.json: damaged"):
        build_sweep_page(tmp_path)
    assert not (tmp_path / "sweep.html").exists()


def test_a_page_needs_both_files(tmp_path: Path, example: Path) -> None:
    with pytest.raises(DataError, match=r"sweep\.json: there is none"):
        build_sweep_page(tmp_path)
    (tmp_path / "sweep.json").write_bytes((example / "sweep.json").read_bytes())
    with pytest.raises(DataError, match=r"sweep\.parquet: there is none"):
        build_sweep_page(tmp_path)


def test_a_running_sweep_has_a_page_too(tmp_path: Path) -> None:
    text = words(only(tmp_path, [a_trial(0, 0.8), a_trial(1, 0.7, state="running"), a_trial(2, state="waiting")]))
    assert "Not ended. 2 of 3 trials have not run to their end" in text
    assert read_table(tmp_path)[1].state == "running"


# ---- labels


def boxes(svg: str) -> list[tuple[float, float, float, float, str]]:
    """(left, right, top, bottom, text) of every label that is not turned, letters taken as 0.62 em wide."""
    found = []
    for x, y, anchor, content in re.findall(
        r'<text x="([-\d.]+)" y="([-\d.]+)" text-anchor="(\w+)" class="[^"]*">([^<]*)</text>', svg
    ):
        width = (
            len(
                content.replace("&amp;", "&")
                .replace("&#39;", "'")
                .replace("&lt;", "<")
                .replace("&gt;", ">")
                .replace("&#34;", '"')
            )
            * 13
            * 0.56
        )
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        found.append((left, left + width, float(y) - 9, float(y) + 2, content))
    return found


def assert_apart(svg: str) -> None:
    for a, b in itertools.combinations(boxes(svg), 2):
        apart = a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
        assert apart, f"{a[4]!r} lies on {b[4]!r}"


names = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=60)
knob_values = st.one_of(st.floats(1e-9, 1e9), st.integers(-(10**6), 10**6), names, st.booleans(), st.none())


@settings(max_examples=50, deadline=None, phases=UNSHRUNK)
@given(st.data())
def test_labels_of_parallel_coordinates_never_overlap(data: st.DataObject) -> None:
    num_axes, num_trials = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 30))
    titles = data.draw(st.lists(names, min_size=num_axes, max_size=num_axes))
    columns = [data.draw(st.lists(knob_values, min_size=num_trials, max_size=num_trials)) for _ in titles]
    svg = str(sweep_charts.parallel_chart(TOLD, titles, columns, ["line-other"] * num_trials))
    assert_apart(svg)
    assert all(box[0] >= 0 and box[1] <= 960 for box in boxes(svg))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-8, 10), st.floats(0, 1)), min_size=1, max_size=20), st.integers(1, 300))
def test_labels_of_axes_never_overlap(points: list[tuple[float, float]], epochs: int) -> None:
    marks = [sweep_charts.Mark(x, auc, (auc * 0.9, auc), n % 6) for n, (x, auc) in enumerate(points)]
    assert_apart(str(sweep_charts.scatter_chart(TOLD, marks, x_name="Learning rate")))
    lines = [sweep_charts.Line(range(1, epochs + 1), [0.5 + 0.4 * n / epochs for n in range(epochs)], "line-0")]
    assert_apart(str(sweep_charts.curves_chart(TOLD, lines)))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(names, st.floats(-1, 9), st.floats(0, 3)), min_size=1, max_size=12), st.none() | st.floats(0, 2)
)
def test_labels_of_bars_never_overlap(rows: list[tuple[str, float, float]], chance: float | None) -> None:
    svg = str(sweep_charts.bars_chart(TOLD, [(n, v, v - s, v + s) for n, v, s in rows], chance, x_name="Growth"))
    assert_apart(svg)
    assert all(box[0] >= -1 for box in boxes(svg))


def test_ticks_of_a_logarithmic_axis() -> None:
    axis, is_log = sweep_charts.knob_axis([2e-4, 8e-3], "lr")
    assert is_log
    assert [label for _, label in axis.ticks] == ["0.0003", "0.001", "0.003"]
    axis, is_log = sweep_charts.knob_axis([0.1, 0.5], "lr")
    assert not is_log
    assert axis.low < 0.1
    assert axis.high > 0.5


def test_where_values_lie_on_an_axis() -> None:
    assert sweep_charts.spread(["all", 0, 4, 0]) == ([1.0, 0.0, 0.5, 0.0], [(0.0, "0"), (0.5, "4"), (1.0, "all")])
    at, labels = sweep_charts.spread([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert at == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert [label for _, label in labels] == ["1e-05", "0.001", "0.1"]
    assert sweep_charts.spread([True, None])[1] == [(0.0, "none"), (1.0, "yes")]
    assert sweep_charts.spread([3])[0] == [0.5]
