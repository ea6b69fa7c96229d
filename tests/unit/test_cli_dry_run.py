"""`medtl train --dry-run`: the resolved config and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from medtl_dist.cli.main import run
from medtl_dist.config import load_config, parse_yaml, validate


def test_a_dry_run_prints_the_resolved_config_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    choices = ["--preset", "smoke", "--set", "data.shards=s3://nowhere/set"]
    assert run(["train", *choices, "--run-dir", "s3://nowhere/runs/a", "--resume", "--test", "--dry-run"]) == 0
    printed = validate(parse_yaml(capsys.readouterr().out, "output"))
    assert printed == load_config(preset="smoke", overrides=["data.shards=s3://nowhere/set"])
    assert run(["train", *choices, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_finds_mistakes_in_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--preset", "smoke", "--set", "optim.lr=-1", "--dry-run"]) == 2
    assert "optim.lr = -1" in capsys.readouterr().err


def test_a_run_folder_on_a_web_server_is_refused_instead_of_made_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "--preset", "smoke", "--set", "data.shards=x", "--run-dir", "https://host/runs/a"]) == 2
    assert "https://host/runs/a: a web server can only be read from" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
