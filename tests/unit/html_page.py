"""What a browser would find in a page, and run folders to make pages of."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

from medtl_dist.report.build import build_report

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


def copied_run(folder: Path, dest: Path) -> Path:
    """What the report of a run is made from, once more, to be changed."""
    for name in ("config.yaml", "results.json", "history.parquet"):
        (dest / name).write_bytes((folder / name).read_bytes())
    return dest
