"""The sweep's page in headless Chromium: nothing overflows, no two labels of a chart touch, its style gets past its policy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from example_sweep import write_example
from test_report_browser import PROBE, WIDTHS, chromium, out  # pyright: ignore[reportMissingImports]

from medtl_dist.report.sweep_page import build_sweep_page

__all__ = ["out"]  # the fixture

SWEEPS = {
    "usual": {"num_trials": 16, "seed": 3},
    "few": {"num_trials": 3, "epochs": 1, "num_patients": 40, "faults": False, "cached": False},
    "several": {
        "classes": ("No finding", "Effusion", "</svg><script>document.title='owned'</script>"),
        "num_trials": 40,
    },
}
# Labels of one chart whose boxes meet; the browser's own boxes, at the size at which they are drawn.
TOUCHING = """<script>
const touching = [];
for (const svg of document.querySelectorAll('svg.chart')) {
  const all = [...svg.querySelectorAll('text')].map(t => [t.getBoundingClientRect(), t.textContent]);
  for (let i = 0; i < all.length; i++) for (let j = 0; j < i; j++) { const a = all[i][0], b = all[j][0];
    if (a.width && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
      touching.push(all[i][1] + ' | ' + all[j][1]); } }
const more = document.createElement('pre'); more.id = 'touching'; more.textContent = JSON.stringify(touching);
document.body.append(more);
</script>"""


@pytest.fixture(scope="session", params=sorted(SWEEPS))
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sweep_page(write_example(tmp_path_factory.mktemp("sweeps") / request.param, **SWEEPS[request.param]))


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_is_cut_off_or_touches(page: Path, tmp_path: Path, width: int) -> None:
    source, number = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    assert number == 1
    copy = tmp_path / "probe.html"
    copy.write_text(source.replace("<details", "<details open").replace("</body>", TOUCHING + PROBE + "</body>"))
    dom = chromium(copy, tmp_path, f"--window-size={width},2000", "--dump-dom").stdout
    found = {}
    for ident in ("probe", "touching"):
        (text,) = re.findall(rf'<pre id="{ident}">(.*?)</pre>', dom, re.DOTALL)
        found[ident] = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["touching"] == []
    assert found["probe"]["wide"] == []
    assert found["probe"]["cut"] == []
    assert found["probe"]["title"].endswith(": sweep report")


def test_screenshot_is_quiet(page: Path, out: Path, tmp_path: Path) -> None:
    file = out / f"sweep-{page.parent.name}.png"
    said = chromium(page, tmp_path, "--window-size=1100,3600", f"--screenshot={file}").stderr
    assert "Content Security Policy" not in said
    assert "ERR_" not in said
    assert file.stat().st_size > 20_000
