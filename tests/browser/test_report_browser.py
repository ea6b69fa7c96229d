"""The report in headless Chromium: its style gets past its own policy, nothing overflows, it prints, it asks for nothing.

Set MEDTL_BROWSER_OUT=FOLDER to keep the screenshots and the PDF, and look at them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from example_run import write_run

from medtl_dist.report.build import build_report

LONG = "Consolidation (lobar, with air bronchogram), of the middle or the lower lobe"
RUNS = {
    "binary": {},
    "val-only": {"test": False, "known_patients": False, "epochs": 1, "num_patients": (6, 9)},
    "several": {"classes": ["No finding", "Effusion", "Nodule"], "num_patients": (40, 30, 30)},
    "many": {"classes": [*(f"Finding {n}" for n in range(11)), LONG], "num_patients": [8] * 12},
    "long-names": {"classes": ["</svg><script>document.title='owned'</script>", f'"><img src=x> {LONG}']},
    "undefined": {"num_patients": (0, 30)},
}
WIDTHS = (1100, 760, 520)  # Chromium opens no window narrower than 500

# Only in the test's copy of the page, whose policy is taken out: what a person would see as broken.
PROBE = """<script>
const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 120));
const cut = [...document.querySelectorAll('svg.chart text')].filter(t => { const b = t.getBoundingClientRect(),
  s = t.closest('svg').getBoundingClientRect(); return s.width && (b.left < s.left - 1 || b.right > s.right + 1
  || b.top < s.top - 1 || b.bottom > s.bottom + 1); }).map(t => t.textContent);
const out = document.createElement('pre'); out.id = 'probe';
out.textContent = JSON.stringify({wide, cut, title: document.title}); document.body.append(out);
</script>"""


def chromium(page: Path, scratch: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs headless Chromium on a page, without a network (no host name resolves)."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.fail("this stage needs Chromium: apt-get install chromium")
    flags = [
        "--headless",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--user-data-dir={scratch / 'profile'}",
    ]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # as root (in a container) Chromium won't start with it
    command = [program, *flags, *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = os.environ.get("MEDTL_BROWSER_OUT")
    folder = Path(chosen) if chosen else tmp_path_factory.mktemp("out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


@pytest.fixture(scope="session", params=sorted(RUNS))
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(write_run(tmp_path_factory.mktemp("runs") / request.param, **RUNS[request.param]))


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_or_is_cut_off(report: Path, tmp_path: Path, width: int) -> None:
    source, number = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text())
    assert number == 1
    copy = tmp_path / "probe.html"
    copy.write_text(source.replace("<details", "<details open").replace("</body>", PROBE + "</body>"))
    dom = chromium(copy, tmp_path, f"--window-size={width},2000", "--dump-dom").stdout
    (found,) = re.findall(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    probe = json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert probe["wide"] == []
    assert probe["cut"] == []
    assert probe["title"].endswith(": model report")


def test_screenshot_is_styled_and_quiet(report: Path, out: Path, tmp_path: Path) -> None:
    name = report.parent.name
    for width in WIDTHS:
        file = out / f"{name}-{width}.png"
        said = chromium(report, tmp_path, f"--window-size={width},3000", f"--screenshot={file}").stderr
        assert "Content Security Policy" not in said
        assert "ERR_" not in said
        image = cv2.imread(str(file))
        assert image is not None
        assert image.shape[:2] == (3000, width)
        # The cautions' background (style.css) is on the page: the style's hash fits its policy.
        assert (np.abs(image.astype(int) - (0xEC, 0xF6, 0xFD)).max(axis=2) == 0).mean() > 0.01


def test_prints_on_a_few_pages_of_a4(report: Path, out: Path, tmp_path: Path) -> None:
    file = out / f"{report.parent.name}.pdf"
    chromium(report, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={file}")
    pdf = file.read_bytes()
    sizes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert 3 <= len(sizes) <= 12
    assert {(round(float(w)), round(float(h))) for w, h in sizes} == {(595, 842)}
