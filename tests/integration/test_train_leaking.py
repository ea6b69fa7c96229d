"""From a set that leaks to the report: `pack` ends with 4 and leaves the set whole, `train` says it, `--fix` silences it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from audit_sets import Entry, base, texture, write_entries

from medtl_dist.cli.main import run
from medtl_dist.data.shards import open_dataset, read_split


def test_a_leaking_set_is_complete_and_its_runs_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_entries(tmp_path / "source", [*base(40), Entry(texture(0), "Doe-same", "test")])
    pack = [
        "data",
        "pack",
        str(table),
        "--out",
        str(tmp_path / "set"),
        "--group-col",
        "patient",
        "--split-col",
        "split",
    ]
    assert run([*pack, "--workers", "1"]) == 4
    assert "1 pair of images show the same picture in two splits" in capsys.readouterr().err
    dataset = open_dataset(tmp_path / "set")
    assert sum(read_split(dataset, split).num_rows for split in dataset.splits) == 41
    assert run(["data", "verify", str(tmp_path / "set")]) == 0
    mend = ["data", "audit", str(tmp_path / "set"), "--workers", "1", "--fix", str(tmp_path / "mended")]
    assert run(mend) == 0
    for name, leaks in (("set", 1), ("mended", 0)):
        folder = tmp_path / "runs" / name
        train = ["train", "--preset", "smoke", "--set", "train.threads=1", "--set", f"data.shards={tmp_path / name}"]
        assert run([*train, "--run-dir", str(folder)]) == 0
        assert json.loads((folder / "results.json").read_text())["data"]["audit"]["leaks"] == leaks
        page = (folder / "report.html").read_text()
        assert ("Leakage." in page) == bool(leaks)
        assert ("found 1 leak between its splits" in page) == bool(leaks)
