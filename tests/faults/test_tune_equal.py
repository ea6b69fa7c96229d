"""One sweep four times, bit for bit: without the cache, with it, killed halfway and resumed, and as far as ASHA lets it run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drivers import trial
from nodes import Command, Machine, wait_for

pytestmark = pytest.mark.ray

_EPOCHS = 5
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


@dataclass(frozen=True)
class Sweeps:
    """Sweeps that differ in nothing but scheduler and cache, on one cluster."""

    cluster: Machine
    options: list[str]

    def begin(self, folder: Path, scheduler: str, cache: str, *, resume: bool = False) -> Command:
        settings = (f"tune.scheduler={scheduler}", f"tune.prefix_cache={cache}")
        given = [*self.options, *_set(settings), "--sweep-dir", str(folder), *(["--resume"] if resume else [])]
        return Command([sys.executable, "-m", "medtl_dist.cli.main", *given], self.cluster.environment(), folder)

    def whole(self, folder: Path, scheduler: str, cache: str, *, resume: bool = False) -> Path:
        code, errors = self.begin(folder, scheduler, cache, resume=resume).finish()
        assert code == 0, errors
        return folder


def _set(settings: Iterable[str]) -> list[str]:
    return [part for text in settings for part in ("--set", text)]


@pytest.fixture(scope="module")
def sweeps(cluster: Machine, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Sweeps:
    space = tmp_path_factory.mktemp("equal") / "space.yaml"
    space.write_text(json.dumps(_SPACE))
    settings = (
        f"cluster.address={cluster.address}", f"data.shards={shards}", "model.backbone=timm/test_resnet",
        f"train.epochs={_EPOCHS}", "train.threads=1", "augment.views=2", "schedule.name=cosine",
    )  # fmt: skip
    given = ["tune", "--preset", "smoke", "--space", str(space), "--num-trials", str(len(_POINTS)), *_set(settings)]
    return Sweeps(cluster, given)


@pytest.fixture(scope="module")
def uncached(sweeps: Sweeps, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep that the others have to equal."""
    return sweeps.whole(tmp_path_factory.mktemp("uncached") / "sweep", "none", "off")


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
    logs = [folder / "trials" / f"{number:05d}" / "log.jsonl" for number in range(len(_POINTS))]
    return ["prefix cache on: " in log.read_text() for log in logs]


def _assert_same_sweep(one: Path, other: Path) -> None:
    for number in range(len(_POINTS)):
        curve = _learnt(other, number)
        assert [row["epoch"] for row in curve] == list(range(_EPOCHS))
        assert _learnt(one, number) == curve
        assert len(_scores(other, number)) == _EPOCHS
        assert _scores(one, number) == _scores(other, number)
    assert sorted(row["trial"] for row in _ranking(other)) == list(range(len(_POINTS)))
    assert _ranking(one) == _ranking(other)


def test_with_the_cache_it_is_the_same_sweep(sweeps: Sweeps, uncached: Path, tmp_path: Path) -> None:
    cached = sweeps.whole(tmp_path / "sweep", "none", "on")
    assert _used_cache(cached) == [True] * len(_POINTS)
    assert _used_cache(uncached) == [False] * len(_POINTS)
    _assert_same_sweep(cached, uncached)


def test_killed_halfway_and_resumed_it_is_the_same_sweep(sweeps: Sweeps, uncached: Path, tmp_path: Path) -> None:
    folder, every = tmp_path / "sweep", range(len(_POINTS))

    def ended() -> set[int]:
        return {number for number in every if trial(folder, number)["state"] == "finished"}

    command = sweeps.begin(folder, "none", "on")
    wait_for("a finished trial", lambda: ended() or None)
    command.process.kill()
    command.process.communicate()
    assert 0 < len(ended()) < len(_POINTS)
    assert not (folder / "sweep.json").exists()
    before = {number: trial(folder, number) for number in ended()}
    sweeps.whole(folder, "none", "on", resume=True)
    _assert_same_sweep(folder, uncached)
    for number, record in before.items():  # nothing was run again
        assert trial(folder, number) == record


def test_under_asha_equal_trials_have_equal_curves_as_far_as_they_run(
    sweeps: Sweeps, uncached: Path, tmp_path: Path
) -> None:
    folder = sweeps.whole(tmp_path / "sweep", "asha", "on")
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
