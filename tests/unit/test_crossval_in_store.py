"""A cross-validation in a store, without server or Ray: the one of a disk, fold by fold, also when its driver is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from dying_runs import assert_same_bits
from fake_store import Stores, stores_in
from one_driver import drive_here
from shard_sets import write_set
from stored_runs import copied
from tiny_backbone import tiny_registered

from cluster import folds
from cluster.job_files import framed, unframed
from cluster.trial_state import TrialSpec
from medtl_dist.cli.main import run
from medtl_dist.config import load_config
from medtl_dist.errors import Interrupted
from medtl_dist.run import LocalRun
from medtl_dist.storage import Folder
from medtl_dist.store_folder import StoreFolder
from medtl_dist.sweep.outcome import Outcome
from medtl_dist.train.lease import held_lease
from medtl_dist.train.run_store import opened_fold, opened_run

URL = "s3://bucket/runs/cv"
FOLDS = ("01-1", "01-2", "01-3")
_CLOCK = ("seconds", "started", "finished")


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    with tiny_registered():
        yield


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    with stores_in(tmp_path / "stores") as found:
        yield found


@pytest.fixture
def here(stores: Stores) -> Path:
    """Where the cross-validation's objects lie."""
    return stores.path(URL)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = {"train": [13, 11], "val": [10], "test": [4]}
    return write_set(tmp_path_factory.mktemp("crossval") / "set", sizes).folder


@pytest.fixture(scope="module")
def near(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a disk, its sets kept."""
    folder = tmp_path_factory.mktemp("near") / "cv"
    with tiny_registered():
        assert run(command(shards, folder, "--keep-folds")) == 0
    return folder


def command(shards: str, place: str | Path, *more: str) -> list[str]:
    settings = (f"data.shards={shards}", "model.backbone=tiny", "train.threads=1", "train.epochs=2")
    given = [part for text in settings for part in ("--set", text)]
    return ["crossval", "--folds", "3", "--preset", "smoke", *given, "--run-dir", str(place), *more]


def timeless(tree: Any) -> Any:
    """A JSON value without what the clock said."""
    if isinstance(tree, dict):
        return {key: timeless(value) for key, value in tree.items() if key not in _CLOCK}
    return [timeless(value) for value in tree] if isinstance(tree, list) else tree


def assert_same(near: Path, stores: Stores, to: Path) -> None:
    """Every fold's weights, history and scores, and the pooled result, to the bit."""
    far = stores.path(URL)
    for name in FOLDS:
        fold = copied(stores.folder(f"{URL}/folds/{name}"), to / name)
        assert_same_bits(near / "folds" / name, fold)
        told, again = (json.loads((place / "results.json").read_text()) for place in (near / "folds" / name, fold))
        assert [told[key] for key in ("splits", "best_checkpoint", "model")] == [
            again[key] for key in ("splits", "best_checkpoint", "model")
        ]
    names = [f"folds/{name}/predictions/held_out.parquet" for name in FOLDS]
    for name in (*names, "predictions/oof.parquet", "ensemble.json", "folds.json"):
        assert (far / name).read_bytes() == (near / name).read_bytes(), name
    told, again = (json.loads((place / "crossval.json").read_text()) for place in (near, far))
    assert timeless(told) == timeless(again)
    assert (far / "crossval.html").read_text().startswith("<!DOCTYPE html>")


def leases(fold: Path) -> list[str]:
    """Those handed out for the fold, and those that its checkpoints were written under."""
    under = {place.name.partition("-")[2] for place in (fold / "checkpoints").iterdir()}
    return sorted({path.name.lstrip("0") for path in (fold / ".lease").iterdir()} | {one.lstrip("0") for one in under})


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def drive_some(patch: pytest.MonkeyPatch, number: int, then: BaseException | None = None) -> None:
    """Instead of Ray's workers one here, which trains as many folds of those given; then the driver is lost."""

    def drive(folder: Folder, specs: Sequence[TrialSpec], _: object, **__: object) -> list[Outcome]:
        outcomes = drive_here(folder, list(specs)[:number])
        if then is not None:
            raise then
        return outcomes

    patch.setattr(folds, "run_trials", drive)


def test_a_cross_validation_in_a_store_is_the_one_of_a_disk(
    near: Path, shards: str, stores: Stores, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = ("--set", "data.anonymous=true")  # of the source: the folds' own sets are not everybody's
    assert run(command(shards, URL, "--keep-folds", *public)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"page  {URL}/crossval.html"
    assert_same(near, stores, tmp_path / "far")
    for name in FOLDS:
        config = load_config(file=here / "folds" / name / "config.yaml")
        assert (config.data.shards, config.data.anonymous) == (f"{URL}/sets/{name}", False)
        assert leases(here / "folds" / name) == ["10001"]
        sets = [{file.name: file.read_bytes() for file in (place / "sets" / name).iterdir()} for place in (near, here)]
        assert sets[0] == sets[1]
    assert json.loads((here / ".lease" / "00000001").read_text())["released"] is True
    last = [name for name in stores.puts if "/.lease/" not in name][-2:]
    assert last == ["runs/cv/crossval.json", "runs/cv/crossval.html"]
    # What is asked of it afterwards.
    handed = unframed(framed(stores.folder(URL)) or "")
    assert handed is not None
    assert set(handed) == {"crossval.json", "crossval.html"}
    puts = len(stores.puts)
    assert run(["report", URL]) == 0
    assert capsys.readouterr().out == f"{URL}/crossval.html\n"
    assert len(stores.puts) == puts  # it was the page already
    assert run(["status", URL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], [part["state"] for part in found["parts"]]) == ("finished", ["finished"] * 3)


def test_folds_at_once_are_those_one_after_another(
    near: Path, shards: str, stores: Stores, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    drive_some(monkeypatch, 3)
    assert run(command(shards, URL, "--parallel")) == 0
    assert_same(near, stores, tmp_path / "far")
    assert not (here / "sets").exists()
    assert not (here / "trials").exists()
    again = json.loads((here / "folds" / "01-2" / "trial.json").read_text())
    assert (again["number"], again["state"]) == (1, "finished")
    stamps = [(here / "folds" / name / "results.json").stat().st_mtime_ns for name in FOLDS]
    monkeypatch.undo()  # there is nothing left for which Ray would be asked
    assert run(command(shards, URL, "--parallel", "--resume")) == 0
    assert "3 of 3 folds had already finished" in capsys.readouterr().err
    assert [(here / "folds" / name / "results.json").stat().st_mtime_ns for name in FOLDS] == stamps
    # On a disk likewise, each in its own place from the first step on.
    drive_some(monkeypatch, 3)
    assert run(command(shards, tmp_path / "cv", "--parallel")) == 0
    assert not (tmp_path / "cv" / "trials").exists()
    tables = [pq.read_table(place / "predictions" / "oof.parquet") for place in (near, tmp_path / "cv")]
    assert tables[0].equals(tables[1])


def test_a_driver_that_is_lost_twice_costs_nothing_that_was_committed(
    near: Path, shards: str, stores: Stores, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """At once, then one after another, then at once again: the first fold trained and not scored, the second begun."""

    class Lost(BaseException):
        pass

    drive_some(monkeypatch, 1, Lost())
    with pytest.raises(Lost):
        run(command(shards, URL, "--parallel"))
    assert not (here / "folds" / "01-1" / "predictions" / "held_out.parquet").exists()
    first = here / "folds" / "01-1" / "results.json"
    stamp = first.stat().st_mtime_ns

    def lose(self: LocalRun, metrics: object) -> None:
        if self.folder.url.endswith("01-2"):
            raise Lost

    with monkeypatch.context() as patch:
        patch.setattr(LocalRun, "report", lose)  # its first epoch is committed
        with pytest.raises(Lost):
            run(command(shards, URL, "--resume"))
    assert (here / "folds" / "01-1" / "predictions" / "held_out.parquet").exists()
    assert not (here / "sets" / "01-1").exists()
    begun = [place.name for place in (here / "folds" / "01-2" / "checkpoints").iterdir()]
    assert {name.partition("-")[2] for name in begun} == {"020001"}

    drive_some(monkeypatch, 3)
    capsys.readouterr()
    assert run(command(shards, URL, "--resume", "--parallel")) == 0
    assert "1 of 3 folds had already finished" in capsys.readouterr().err
    assert first.stat().st_mtime_ns == stamp
    log = (here / "folds" / "01-2" / "log.jsonl").read_text()
    assert "resumed at epoch 1, step 0" in log
    assert leases(here / "folds" / "01-2")[-1] == "30001"
    assert_same(near, stores, tmp_path / "far")
    assert not (here / "sets").exists()


def test_two_drivers_are_refused(shards: str, stores: Stores, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held_lease(stores.folder(URL), owner="a colleague", ttl_s=0.4):
        assert run(command(shards, URL)) == 2
    assert errors(capsys)[0].startswith(f"error: {URL}: a colleague is writing in this run folder; wait for it or stop")
    assert {path.name for path in here.iterdir()} == {".lease"}


def test_a_driver_that_is_replaced_deletes_no_set_and_writes_no_result(
    shards: str, stores: Stores, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def replaced(*_: object, **__: object) -> list[Outcome]:
        for name in FOLDS:  # all that is left is to score them
            (here / "folds" / name).mkdir(parents=True)
            (here / "folds" / name / "results.json").write_text("{}")
        (here / ".lease" / "00000002").write_bytes(b"{}")
        return []

    monkeypatch.setattr(folds, "run_trials", replaced)
    monkeypatch.setattr("medtl_dist.train.crossval.score_held_out", lambda *_: None)
    assert run(command(shards, URL, "--parallel")) == 75
    assert "another process has taken over this run" in errors(capsys)[0]
    assert sorted(path.name for path in (here / "sets").iterdir()) == list(FOLDS)
    assert not (here / "crossval.json").exists()


def test_a_fold_has_one_writer_and_goes_on_with_the_whole_only(
    shards: str, stores: Stores, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(preset="smoke", overrides=[f"data.shards={shards}"])
    with opened_run(URL, config, resume=False, say=print) as whole:
        part = whole.part("folds/01-1")
        with opened_fold(part, config) as old, opened_fold(part, config) as new:
            assert isinstance(old, StoreFolder)
            assert old.guard is not None
            old.guard.asked = -1e9  # it asks every two seconds
            with pytest.raises(Interrupted, match="another process has taken over"):
                old.write("note", b"old")
            new.write("note", b"new")
        (here / ".lease" / "00000002").write_bytes(b"{}")
        with pytest.raises(Interrupted, match="another process has taken over"), opened_fold(part, config):
            pass
    assert (here / "folds" / "01-1" / "note").read_bytes() == b"new"
    given = ["--preset", "smoke", "--set", f"data.shards={shards}", "--run-dir", f"{URL}/folds/01-1", "--resume"]
    assert run(["train", *given]) == 2
    assert f"{URL}/folds/01-1 is a part of the run {URL}" in errors(capsys)[0]


def test_the_folds_ensemble_is_used_from_the_store(
    near: Path, shards: str, stores: Stores, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.yaml", "ensemble.json", *(f"folds/{fold}" for fold in FOLDS)):
        files = (
            [near / name] if (near / name).is_file() else [path for path in (near / name).rglob("*") if path.is_file()]
        )
        for file in files:
            target = here / file.relative_to(near)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    for where, name in ((URL, "far"), (near, "near")):
        (tmp_path / name).mkdir()
        assert run(["predict", str(where), shards, "--out", str(tmp_path / name / "scores.parquet")]) == 0
    far, close = ((tmp_path / name / "scores.parquet").read_bytes() for name in ("far", "near"))
    assert far == close
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "message"),
    [("s3://bucket", "is a whole bucket"), ("https://host/x", "a web server can only be read from")],
)
def test_places_that_can_not_be_a_cross_validation_s(
    place: str, message: str, shards: str, stores: Stores, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(shards, place)) == 2
    assert message in errors(capsys)[0]


def test_another_cross_validation_is_told_by_its_address(
    shards: str, stores: Stores, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drive_some(monkeypatch, 0, Interrupted("the first driver is lost"))
    assert run(command(shards, URL, "--parallel")) == 75
    before = {path for path in here.rglob("*") if ".lease" not in path.parts}
    for more, message in (
        ((), "already holds a run; add --resume"),
        (("--resume", "--repeats", "2"), "holds another cross-validation (repeats: 1 -> 2)"),
        (("--resume", "--set", "optim.lr=0.5"), "holds a run of another config (optim.lr: "),
    ):
        capsys.readouterr()
        assert run(command(shards, URL, *more)) == 2
        assert errors(capsys)[0].startswith(f"error: {URL} {message}")
    assert {path for path in here.rglob("*") if ".lease" not in path.parts} == before


def test_a_submission_names_the_store_and_trains_folds_on_the_cluster_s_workers(
    shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--preset", "smoke", "--set", f"data.shards={shards}", "--store", "s3://bucket/medtl", "--name", "folds"]
    assert run(["submit", "crossval", *given, "--address", "http://127.0.0.1:9", "--dry-run"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["run_folder"] == "s3://bucket/medtl/runs/folds"
    assert facts["entrypoint"].split()[4:] == [
        "crossval", "--config", "config.yaml", "--run-dir", "s3://bucket/medtl/runs/folds", "--resume",
        "--folds", "5", "--repeats", "1", "--epochs-from", "fixed", "--parallel",
    ]  # fmt: skip
