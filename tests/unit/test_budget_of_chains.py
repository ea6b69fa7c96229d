"""`medtl train --max-gpu-hours` with stages: one limit for all trainings and attempts, ended at a checkpoint with exit code 5."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from shard_sets import write_set
from tiny_backbone import tiny_registered

from medtl_dist.cli.main import run
from medtl_dist.train import budget, loop

Clock = list[float]
Train = Callable[..., int]


@pytest.fixture(autouse=True)
def hours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """A tiny network; by the account's clock every epoch takes an hour, and nothing else takes any time."""
    clock, close_epoch = [0.0], loop.close_epoch

    def longer(session: Any, spent: Any) -> None:
        close_epoch(session, spent)
        clock[0] += 3600

    monkeypatch.setattr(loop, "close_epoch", longer)
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with tiny_registered():
        yield clock


def _command(place: Path, folder: Path, **transfer: Any) -> Train:
    write_set(place / "set", {"train": [18], "val": [12]})
    stages = [{"name": "source", "train": {"epochs": 2}}, {"name": "target", "train": {"epochs": 3}}]
    tree = {
        "data": {
            "shards": str(place / "set"), "image_size_px": 16, "global_batch_size": 6, "eval_batch_size": 6, "loader_workers": 0,
        },
        "model": {"backbone": "tiny", "weights": "random"},
        "train": {"precision": "fp32", "threads": 1},
        "evaluate": {"bootstrap_samples": 20},
        "transfer": {"stages": stages} | transfer,
    }  # fmt: skip
    (place / "chain.yaml").write_text(yaml.safe_dump(tree))
    given = ["train", "--config", str(place / "chain.yaml"), "--run-dir", str(folder), "--resume"]
    return lambda *more: run([*given, *more])


def _used(folder: Path) -> dict[str, float]:
    files = sorted(folder.rglob("budget.json"))
    return {str(file.parent.relative_to(folder)): json.loads(file.read_text())["gpu_hours"] for file in files}


def test_a_chain_stops_in_the_stage_that_uses_its_hours_up_and_goes_on_with_more(
    tmp_path: Path, hours: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "limited"
    train = _command(tmp_path, folder)
    assert train("--max-gpu-hours", "3.5") == 5
    assert "stopped: 4 of 3.5 GPU hours are used" in capsys.readouterr().err
    source, target = folder / "stages/1-source", folder / "stages/2-target"
    assert (source / "results.json").exists()
    assert len(list((target / "checkpoints").iterdir())) == 2  # an hour and a half were left to it
    assert not (target / "results.json").exists()
    assert train("--max-gpu-hours", "3.5") == 5  # at once, without training
    assert train("--max-gpu-hours", "4") == 5
    assert hours == [4 * 3600]
    assert run(["status", str(folder)]) == 0
    assert "GPU hours: 4 used, of 4\n" in capsys.readouterr().out

    assert train("--max-gpu-hours", "5.5") == 0
    assert hours == [5 * 3600]
    assert _used(folder) == {".": 4, "stages/1-source": 2, "stages/2-target": 3}
    assert run(["status", str(folder), "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["budget"] == {"max_gpu_hours": 5.5, "gpu_hours": 5}
    # The same weights as of a chain that nobody stopped; and a finished one ends at once, whatever its limit.
    undisturbed = tmp_path / "undisturbed"
    assert _command(tmp_path, undisturbed)() == 0
    for part in (source, target):
        step = f"{json.loads((part / 'results.json').read_text())['best_checkpoint']:08d}"
        name = part.relative_to(folder) / "checkpoints" / step / "model.safetensors"
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
    assert not list(undisturbed.rglob("budget.json"))
    assert train("--max-gpu-hours", "0.5") == 0


def test_a_comparisons_limit_is_of_all_seeds_and_of_the_last_stage_alone(
    tmp_path: Path, hours: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train = _command(tmp_path, folder, compare=True, seeds=[0, 1])  # 2 + 3 + 3 hours each
    assert train("--max-gpu-hours", "5") == 5  # the first chain's: nothing is left for the target alone
    assert "stopped: 5 of 5 GPU hours are used" in capsys.readouterr().err
    assert hours == [5 * 3600]
    assert (folder / "seeds/0/stages/2-target/results.json").exists()
    assert not list((folder / "seeds/0").rglob("alone/checkpoints/*"))
    assert train("--max-gpu-hours", "9") == 5  # within the second seed's source
    assert hours == [9 * 3600]
    assert not (folder / "compare.json").exists()
    assert train() == 0  # without a limit, and still counted
    assert (folder / "compare.json").exists()
    used = _used(folder)
    assert used.pop(".") == 13  # as the last training began
    assert used == {
        f"seeds/{seed}/{part}": 2 if part.endswith("source") else 3
        for seed in (0, 1)
        for part in ("stages/1-source", "stages/2-target", "alone")
    }


def test_a_limit_that_is_none_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _command(tmp_path, tmp_path / "run")("--max-gpu-hours", "-1") == 2
    assert "--max-gpu-hours -1: expected a positive number of hours." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
