"""Nothing in a run folder can break out of the report, and damage is named."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_run import write_run
from html_page import VOID, Page, copied_run, page_of, results_of, rewrite
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from medtl_dist.errors import DataError, UserError
from medtl_dist.report import build, record, schema
from medtl_dist.report.build import build_report

# Shrinking a page that takes 0.1 s would take minutes; a name that breaks it is readable as it is.
UNSHRUNK = (Phase.explicit, Phase.generate)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "pneumonia-1")


@pytest.fixture(scope="module")
def binary_page(binary: Path) -> Page:
    return page_of(binary)


@pytest.fixture
def copy(binary: Path, tmp_path: Path) -> Path:
    return copied_run(binary, tmp_path)


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
