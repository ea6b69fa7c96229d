"""A chain's run folder and its trainings': which they are, and in a store one lease for all."""

from __future__ import annotations

import contextlib
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from store_on_disk import stored_in

from cluster import train as ray_train
from medtl_dist import store_folder
from medtl_dist.config import load_config, validate
from medtl_dist.errors import Interrupted, TrainingError, UserError
from medtl_dist.storage import Folder, StorageOptions
from medtl_dist.store_folder import StoreFolder
from medtl_dist.train import budget, ledger
from medtl_dist.train.chain import check_chain
from medtl_dist.train.lease import fenced
from medtl_dist.train.run_folder import above, parts_in, parts_of, whole_of
from medtl_dist.train.run_store import opened_run, status_in

WHOLE = "s3://bucket/runs/chain"
STAGES = [{"name": "a"}, {"name": "b"}]


def _run(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "config.yaml").write_text("{}")


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreFolder:
    """A chain's folder with two stages, in a store."""
    stored_in(tmp_path, monkeypatch)
    folder = tmp_path / "bucket" / "runs" / "chain"
    for place in (folder, folder / "stages" / "1-a", folder / "stages" / "2-b"):
        _run(place)
    (folder / ".lease").mkdir()
    (folder / ".lease" / "00000001").touch()
    return store_folder.store_folder(WHOLE, StorageOptions(retries=0))


def test_parts_come_in_the_order_of_their_training(tmp_path: Path) -> None:
    names = [f"seeds/{seed}/{part}" for part in ("stages/1-a", "stages/2-b") for seed in (3, 4)]
    names += ["seeds/3/alone", "seeds/4/alone"]
    for name in names:
        _run(tmp_path / name)
    (tmp_path / "seeds" / "5" / "alone").mkdir(parents=True)  # not begun
    (tmp_path / "seeds" / "note.txt").touch()
    assert parts_in(Folder.local(tmp_path)) == [
        "seeds/3/stages/1-a", "seeds/3/stages/2-b", "seeds/4/stages/1-a", "seeds/4/stages/2-b",
        "seeds/3/alone", "seeds/4/alone",
    ]  # fmt: skip
    assert parts_of(tmp_path)[-1] == tmp_path / "seeds" / "4" / "alone"
    assert parts_of(tmp_path / "seeds" / "3" / "alone") == []


@pytest.mark.parametrize(
    ("path", "whole"),
    [
        ("b/run/stages/1-a", "b/run"),
        ("b/run/seeds/3/stages/1-a", "b/run"),
        ("b/run/seeds/3/alone", "b/run"),
        ("b/run/folds/01-1", "b/run"),
        ("b/run/seeds/3", "b/run"),
        ("b/run", "b/run"),
        ("b/run/alone", "b/run/alone"),
        ("b", "b"),
    ],
)
def test_the_whole_is_told_by_the_names(path: str, whole: str) -> None:
    assert above(PurePosixPath(path)) == PurePosixPath(whole)


def test_a_stages_whole_is_a_run_and_no_bucket(whole: StoreFolder, tmp_path: Path) -> None:
    assert whole_of(whole.part("stages/1-a")).url == WHOLE
    assert whole_of(whole) is whole
    (tmp_path / "bucket" / "config.yaml").touch()
    for url in ("s3://bucket/stages/1-a", "s3://bucket/other/stages/1-a"):
        folder = store_folder.store_folder(url, StorageOptions(retries=0))
        assert whole_of(folder) is folder


def test_a_part_is_written_under_the_wholes_lease(whole: StoreFolder, tmp_path: Path) -> None:
    name = "stages/2-b"
    held = fenced(whole, 1).part(name)
    assert (held.fence, held.leased_at, held.url) == (1, WHOLE, f"{WHOLE}/{name}")
    of_worker = fenced(whole.part(name), 1, WHOLE)
    for folder in (held, of_worker):
        folder.write("x", b"mine")
    assert held.read("x") == b"mine"
    (tmp_path / "bucket" / "runs" / "chain" / ".lease" / "00000002").touch()
    for folder in (held, of_worker):
        assert folder.guard is not None
        folder.guard.asked = -1e9
        with pytest.raises(Interrupted, match=r"another process has taken over this run \(lease 2, ours was 1\)"):
            folder.write("x", b"late")


def test_a_worker_is_told_whose_lease_it_writes_under(whole: StoreFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class _Run:
        rank, why = 1, 0

        def __init__(self, folder: StoreFolder, attempt: str) -> None:
            seen.append(folder)

    class _Attempt:
        def __init__(self, *given: object) -> None:
            pass

        def run(self, payload: dict[str, Any]) -> dict[str, Any]:
            return ray_train.work(payload | {"attempt": "attempt-1"})

    monkeypatch.setattr(ray_train, "RayRun", _Run)
    monkeypatch.setattr(ray_train, "Attempt", _Attempt)
    monkeypatch.setattr(ray_train, "connected", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(ray_train, "check_shared", lambda *given: None)
    monkeypatch.setattr(ray_train, "_use_gpu", lambda config: False)
    monkeypatch.setattr(ray_train, "budgeted", contextlib.nullcontext)
    monkeypatch.setattr(ray_train, "fit", lambda *given, **named: None)
    monkeypatch.setattr(ray_train, "folder_at", store_folder.store_folder)
    ray_train.train_on_ray(load_config(), fenced(whole, 1).part("stages/2-b"))
    assert (seen[0].url, seen[0].leased_at, seen[0].fence) == (f"{WHOLE}/stages/2-b", WHOLE, 1)


def test_a_stage_is_not_trained_apart_from_its_chain(whole: StoreFolder) -> None:
    with (
        pytest.raises(UserError, match=f"{WHOLE}/stages/2-b is a part of the run {WHOLE}: go on with that"),
        opened_run(f"{WHOLE}/stages/2-b", load_config(), resume=True, say=lambda text: None),
    ):
        pass


def test_a_stages_openings_lie_beside_the_whole(whole: StoreFolder, tmp_path: Path) -> None:
    (tmp_path / "bucket" / "runs" / "test_openings" / "set").mkdir(parents=True)
    for name, config in (("stages/1-a", "one"), ("stages/2-b", "two")):
        counted = ledger.record_opening_in_store(whole.part(name), dataset_sha256="set", config_sha256=config)
    assert counted == {"count": 2, "configurations": 2}
    assert ledger.count_openings_in_store(whole, "set") == counted


def test_a_limit_of_gpu_hours_is_the_wholes(whole: StoreFolder) -> None:
    one, two = (fenced(whole, 1).part(name) for name in ("stages/1-a", "stages/2-b"))
    budget.limit(one, 3.0, whole=fenced(whole, 1))
    one.write("budget.json", b'{"max_gpu_hours": 3.0, "gpu_hours": 1.25}')
    budget.limit(two, 3.0, whole=fenced(whole, 1))
    assert [budget.read(place) for place in (whole, one, two)] == [
        {"max_gpu_hours": 3.0, "gpu_hours": 1.25},
        {"max_gpu_hours": 3.0, "gpu_hours": 1.25},
        {"max_gpu_hours": 1.75, "gpu_hours": 0.0},
    ]
    two.write("budget.json", b'{"max_gpu_hours": 1.75, "gpu_hours": 0.5}')
    assert status_in(whole)["budget"] == {"max_gpu_hours": 3.0, "gpu_hours": 1.75}  # while it goes on


def test_a_stage_that_uses_up_the_wholes_hours_tells_the_wholes_numbers(whole: StoreFolder) -> None:
    one, two = (whole.part(name) for name in ("stages/1-a", "stages/2-b"))
    one.write("budget.json", b'{"max_gpu_hours": 3.0, "gpu_hours": 2.0}')
    budget.limit(two, 3.0, whole=whole)
    two.write("budget.json", b'{"max_gpu_hours": 1.0, "gpu_hours": 1.01}')
    with pytest.raises(TrainingError, match=r"stopped: 3\.01 of 3 GPU hours are used"):
        budget.raise_if_used_up(two, whole=whole)
    with pytest.raises(TrainingError, match=r"stopped: 3\.01 of 3 GPU hours are used"):
        budget.limit(two, 3.0, whole=whole)
    with pytest.raises(TrainingError, match=r"stopped: 3\.01 of 1\.5 GPU hours are used"):
        budget.limit(two, 1.5, whole=whole)  # less than the other has used
    assert budget.read(two) == {"max_gpu_hours": 1.0, "gpu_hours": 1.01}  # nothing below zero
    budget.limit(two, 3.5, whole=whole)
    assert budget.read(two) == {"max_gpu_hours": 1.5, "gpu_hours": 1.01}
    budget.limit(two, None, whole=whole)
    assert budget.read(two) == {"max_gpu_hours": None, "gpu_hours": 1.01}
    assert budget.read(whole) == {"max_gpu_hours": None, "gpu_hours": 3.01}


def test_a_whole_that_never_had_a_limit_has_no_account(whole: StoreFolder) -> None:
    one, two = (whole.part(name) for name in ("stages/1-a", "stages/2-b"))
    budget.limit(one, None, whole=whole)
    assert [budget.read(place) for place in (whole, one)] == [None, None]
    budget.limit(one, 1.0, whole=whole)
    budget.limit(two, None, whole=whole)  # the sum goes on, in case that there is a limit again
    assert budget.read(two) == {"max_gpu_hours": None, "gpu_hours": 0.0}


@pytest.mark.parametrize("key", ["endpoint_url", "ca_bundle"])
def test_in_a_store_all_stages_are_reached_alike(key: str) -> None:
    own = [STAGES[0], {"name": "b", "data": {key: "http://elsewhere:9"}}]
    with pytest.raises(
        UserError, match=f"stage b: data.{key} = http://elsewhere:9, and the run folder is reached with None"
    ):
        check_chain(validate({"transfer": {"stages": own}}), in_store=True)
    with pytest.raises(UserError, match=r"data\.shards is not set"):  # on a disk, the next thing is asked
        check_chain(validate({"transfer": {"stages": own}}))
