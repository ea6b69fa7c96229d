"""One sweep four times, bit for bit: without the cache, with it, killed halfway and resumed, and as far as ASHA lets it run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from drivers import driving, processes_of, trial, until
from shard_sets import write_set

pytestmark = pytest.mark.ray

_EPOCHS = 6
# Frozen depth, learning rate, and resamples of an interval that no curve knows of: 0 and 3 are one training under two names.
_POINTS = [(1, 0.05, 200), (2, 0.01, 200), (1, 0.002, 200), (1, 0.05, 100), (2, 0.05, 200)]
_SPACE = {
    "knobs": [
        {"key": "model.frozen_depth", "type": "choice", "values": [1, 2]},
        {"key": "optim.lr", "type": "log_uniform", "low": 1e-4, "high": 1e-1},
        {"key": "evaluate.bootstrap_samples", "type": "choice", "values": [200, 100]},
    ],
    "try_first": [
        {"model.frozen_depth": depth, "optim.lr": lr, "evaluate.bootstrap_samples": samples}
        for depth, lr, samples in _POINTS
    ],
}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    place = tmp_path_factory.mktemp("equal")
    dataset = write_set(place / "set", {"train": [30, 20, 14], "val": [20, 12]})
    (place / "space.yaml").write_text(json.dumps(_SPACE))
    given = (
        f"data.shards={dataset.folder}", "model.backbone=timm/test_resnet", f"train.epochs={_EPOCHS}", "train.threads=1",
        "augment.views=2", "schedule.name=cosine",
    )  # fmt: skip
    trials = ["--space", str(place / "space.yaml"), "--num-trials", str(len(_POINTS))]
    return ["--preset", "smoke", *trials, *(part for text in given for part in ("--set", text))]


@pytest.fixture(scope="module")
def uncached(options: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep that the others have to equal."""
    return _swept(options, tmp_path_factory.mktemp("uncached") / "sweep", scheduler="none", cache="off")


def _settings(scheduler: str, cache: str) -> list[str]:
    return ["--set", f"tune.scheduler={scheduler}", "--set", f"tune.prefix_cache={cache}"]


def _swept(options: list[str | Path], folder: Path, *, scheduler: str, cache: str) -> Path:
    with driving(*options, *_settings(scheduler, cache), "--sweep-dir", folder) as driver:
        code, said = driver.end()
    assert code == 0, said
    assert until(lambda: not processes_of(driver.mark), "without a process left")
    return folder


def _learnt(folder: Path, number: int) -> list[dict[str, Any]]:
    """A trial's curve without its times."""
    return [{key: row[key] for key in row if key != "seconds"} for row in trial(folder, number)["curve"]]


def _ranking(folder: Path) -> list[dict[str, Any]]:
    """All that the ranking says: trials, AUCs and intervals as their shortest decimals, so to the bit."""
    return json.loads((folder / "sweep.json").read_text())["ranking"]


def _scores(folder: Path, number: int) -> list[bytes]:
    """The val logits of every epoch of a trial."""
    files = sorted((folder / "trials" / f"{number:05d}" / "predictions" / "epochs").glob("*.npy"))
    return [np.load(file, allow_pickle=False).tobytes() for file in files]


def _used_cache(folder: Path) -> list[bool]:
    return [value is not None for value in pq.read_table(folder / "sweep.parquet").column("cached_s").to_pylist()]


def _assert_same_sweep(one: Path, other: Path) -> None:
    for number in range(len(_POINTS)):
        curve = _learnt(other, number)
        assert [row["epoch"] for row in curve] == list(range(_EPOCHS))
        assert _learnt(one, number) == curve
        assert len(_scores(other, number)) == _EPOCHS
        assert _scores(one, number) == _scores(other, number)
    assert sorted(row["trial"] for row in _ranking(other)) == list(range(len(_POINTS)))
    assert _ranking(one) == _ranking(other)


def test_with_the_cache_it_is_the_same_sweep(options: list[str | Path], uncached: Path, tmp_path: Path) -> None:
    cached = _swept(options, tmp_path / "sweep", scheduler="none", cache="on")
    assert _used_cache(cached) == [True] * len(_POINTS)
    assert _used_cache(uncached) == [False] * len(_POINTS)
    _assert_same_sweep(cached, uncached)


def test_killed_halfway_and_resumed_it_is_the_same_sweep(
    options: list[str | Path], uncached: Path, tmp_path: Path
) -> None:
    folder, every = tmp_path / "sweep", range(len(_POINTS))
    given = [*options, *_settings("none", "on"), "--sweep-dir", folder]
    with driving(*given) as driver:
        until(lambda: any(trial(folder, number)["state"] == "finished" for number in every), "with a finished trial")
        driver.process.kill()
        driver.process.communicate()
    assert until(lambda: not processes_of(driver.mark), "without a process left")
    ended = {number for number in every if trial(folder, number)["state"] == "finished"}
    assert 0 < len(ended) < len(_POINTS)
    assert not (folder / "sweep.json").exists()
    with driving(*given, "--resume") as driver:
        code, said = driver.end()
    assert code == 0, said
    _assert_same_sweep(folder, uncached)


def test_under_asha_equal_trials_have_equal_curves_as_far_as_they_run(
    options: list[str | Path], uncached: Path, tmp_path: Path
) -> None:
    folder = _swept(options, tmp_path / "sweep", scheduler="asha", cache="on")
    for number in range(len(_POINTS)):
        curve = _learnt(folder, number)
        assert len(curve) >= 1
        assert len(curve) == _EPOCHS or trial(folder, number)["state"] == "stopped"
        assert curve == _learnt(uncached, number)[: len(curve)]
        assert _scores(folder, number) == _scores(uncached, number)[: len(curve)]
    for sweep in (folder, uncached):
        pairs = list(zip(_learnt(sweep, 0), _learnt(sweep, 3), strict=False))
        assert pairs
        assert all(one == other for one, other in pairs)
