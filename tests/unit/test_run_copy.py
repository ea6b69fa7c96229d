"""A run in a store is used as its copy on a disk is: the same scores, files and numbers, and what is wrong is one line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_store import Stores, stores_in
from predict_runs import config_on, pack_table, write_images
from stored_runs import copied
from tiny_backbone import tiny_registered

from cluster.predict import _Maker
from medtl_dist.cli.main import run
from medtl_dist.errors import DataError, Interrupted, UserError
from medtl_dist.run import LocalRun
from medtl_dist.storage import StorageOptions
from medtl_dist.store_folder import StoreFolder, folder_at
from medtl_dist.train.lease import LEASES, held_lease
from medtl_dist.train.loop import fit
from medtl_dist.train.predict import Job, PredictOptions, load_for, predict
from medtl_dist.train.predictor import load_predictor
from medtl_dist.train.run_copy import scorable
from medtl_dist.train.run_store import opened_finished, opened_run

URL, OTHER = "s3://bucket/runs/first", "s3://bucket/runs/second"
WITHIN = ("data.storage_retries=3", "data.endpoint_url=http://127.0.0.1:9")


@dataclasses.dataclass(frozen=True)
class Place:
    """images/, set/, elsewhere/ in ``root``; in the store two runs on the set, the first with frozen layers."""

    root: Path
    stores: Stores

    def store(self, url: str) -> StoreFolder:
        return self.stores.folder(url)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("run-copy")
    with tiny_registered(), stores_in(root / "stores") as stores:
        shards = pack_table(write_images(root / "images"), root / "set")
        pack_table(write_images(root / "others", 24, classes=("healthy", "ill"), seed=7), root / "elsewhere")
        for url, overrides in ((URL, ("model.frozen_depth=2", *WITHIN)), (OTHER, ("train.seed=5", *WITHIN))):
            config = config_on(shards, *overrides)
            with opened_run(url, config, resume=False, say=print) as folder:
                fit(config, LocalRun(folder))
        yield Place(root, stores)


@pytest.fixture
def near(place: Place, tmp_path: Path) -> Path:
    """The first run's copy on a disk."""
    return copied(place.store(URL), tmp_path / "near" / "first")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary copies are made, and nothing is left."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def _told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    assert run([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_copy_is_private_whole_and_no_more_than_scoring_reads(place: Place, near: Path, scratch: Path) -> None:
    with scorable(folder_at(URL)) as here:
        assert here.name == "first"
        assert stat.S_IMODE(here.parent.stat().st_mode) == 0o700
        assert here.parent.parent == scratch
        (step,) = (here / "checkpoints").iterdir()
        assert sorted(path.name for path in here.iterdir()) == ["checkpoints", "config.yaml", "results.json"]
        names = {path.name for path in step.iterdir()}
        assert names == {"manifest.json", "meta.json", "model.safetensors", "frozen.safetensors", "state.pt"}
        for path in here.rglob("*"):
            assert path.is_dir() or path.read_bytes() == (near / path.relative_to(here)).read_bytes()
    assert not here.parent.exists()
    with scorable(folder_at(near)) as here:  # on a disk it is the folder itself
        assert here == near
    assert near.is_dir()


def test_scores_are_to_the_byte_those_of_the_copy(place: Place, near: Path, tmp_path: Path, capsys) -> None:
    puts = len(place.stores.puts)
    command = [str(place.root / "images" / "labels.csv"), "--group-col", "patient", "--part-size", "16", "--out"]
    for where, name in ((URL, "far"), (near, "near")):
        (tmp_path / f"{name}-scores").mkdir()
        told = _told(capsys, "predict", where, *command, tmp_path / f"{name}-scores" / "out.parquet")
        assert (told["scored"], told["bad"]) == (48, 0)
    for file in ("out.parquet", "out.patients.parquet"):
        far, here = (tmp_path / f"{name}-scores" / file for name in ("far", "near"))
        assert far.read_bytes() == here.read_bytes()
    assert len(place.stores.puts) == puts  # nothing is written where the run lies


def test_what_a_lost_writer_left_is_passed_over(place: Place, near: Path, tmp_path: Path) -> None:
    stores = Stores(tmp_path / "more")
    shutil.copytree(place.stores.root, stores.root)
    checkpoints = stores.path(URL) / "checkpoints"
    best = json.loads((near / "results.json").read_text())["best_checkpoint"]
    (whole,) = checkpoints.glob(f"{best:08d}-*")
    shutil.copytree(whole, whole.with_name(f"{best:08d}-000009"))
    (whole.with_name(f"{best:08d}-000009") / "manifest.json").unlink()
    with scorable(stores.folder(URL)) as here:
        found = load_predictor(here, torch.device("cpu"))
    assert found.identity() == load_predictor(near, torch.device("cpu")).identity()


def test_an_actor_elsewhere_fetches_the_run_by_the_runs_own_config(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray ships is a job with an address: no path of the machine where it began, and how the run's store is reached."""
    shipped: list[bytes] = []
    asked: list[StorageOptions | None] = []

    def elsewhere(job: Job, predictor: Any, missing: Any, count: Any) -> None:
        shipped.append(pickle.dumps(job))
        asked.clear()
        for number in missing:
            told = _Maker(_arrived(shipped[0]), 1)({"item": [number]})
            assert (told["error"], told["message"]) == ([""], [""])
            count(told["images"][0])

    at = place.stores.folder

    def watched(url: str, options: StorageOptions | None = None) -> StoreFolder:
        asked.append(options)
        return at(url, options)

    monkeypatch.setattr("medtl_dist.store_folder.store_folder", watched)
    source, options = str(place.root / "images"), PredictOptions(part_size=24)
    predict(URL, source, tmp_path / "ray.parquet", options, make_parts=elsewhere)
    (job,) = map(_arrived, shipped)
    assert (job.run_folder, len(job.inputs.spans)) == (URL, 2)
    assert tempfile.gettempdir().encode() not in shipped[0]
    assert {(one.endpoint_url, one.retries) for one in asked if one} == {("http://127.0.0.1:9", 3)}
    predict(URL, source, tmp_path / "here.parquet", options)
    assert (tmp_path / "ray.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()
    other = dataclasses.replace(job, run_folder=OTHER)
    threads = torch.get_num_threads()
    with pytest.raises(DataError, match=f"{OTHER}: this node has another checkpoint"):
        load_for(other, threads=threads)


def _arrived(job: bytes) -> Job:
    return pickle.loads(job)  # noqa: S301 - of this test


def test_what_is_exported_is_to_the_byte_what_the_copy_exports(
    place: Place, near: Path, tmp_path: Path, capsys
) -> None:
    told = [
        _told(capsys, "export", where, "--out", tmp_path / f"{name}.safetensors")
        for where, name in ((URL, "far"), (near, "near"))
    ]
    assert told[0]["bytes"] == told[1]["bytes"] > 1000
    assert (tmp_path / "far.safetensors").read_bytes() == (tmp_path / "near.safetensors").read_bytes()


def test_a_comparison_is_that_of_the_copies_also_of_one_here_with_one_there(
    place: Place, near: Path, tmp_path: Path, capsys
) -> None:
    second = copied(place.store(OTHER), tmp_path / "near" / "second")
    there, here, mixed = (_told(capsys, "compare", *runs) for runs in ((URL, OTHER), (near, second), (near, OTHER)))
    assert here["n"] == 12
    assert here["comparison"]["auc_a"] is not None
    assert [[one.pop("run") for one in found["runs"]] for found in (there, here, mixed)] == [
        [URL, OTHER],
        [str(near), str(second)],
        [str(near), OTHER],
    ]
    assert there == here == mixed


def test_external_validation_is_written_to_the_store_under_the_lease(
    place: Place, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = Stores(tmp_path / "stores")
    shutil.copytree(place.stores.root, stores.root)
    monkeypatch.setattr(place.stores, "root", stores.root)
    store, near = place.store(URL), copied(place.store(URL), tmp_path / "near" / "first")
    asked = ["--data", place.root / "elsewhere", "--class-map", "healthy=NORMAL,ill=SICK"]
    far_told, near_told = (_told(capsys, "evaluate", where, *asked) for where in (URL, near))
    assert (far_told.pop("folder"), near_told.pop("folder")) == (
        f"{URL}/external/elsewhere",
        f"{near}/external/elsewhere",
    )
    for told in (far_told, near_told):
        del told["provenance"]["finished"]
    assert far_told == near_told
    assert far_told["test_openings"] == {"count": 1, "configurations": 1}
    names = {f"predictions/{split}.parquet" for split in ("train", "val", "test")} | {"external.json", "report.html"}
    found = {info.path.partition("/external/elsewhere/")[2] for info in store.files("external/elsewhere")}
    assert found == names
    for name in names - {"external.json", "report.html"}:
        assert store.read(f"external/elsewhere/{name}") == (near / "external" / "elsewhere" / name).read_bytes()
    page = store.read("external/elsewhere/report.html").decode()
    assert "first on elsewhere" in page
    assert tempfile.gettempdir() not in page
    newest = max(store.names(LEASES))
    assert int(newest) == 2  # the training's, and this one's
    assert json.loads(store.read(f"{LEASES}/{newest}"))["released"] is True
    assert run(["evaluate", URL, *map(str, asked), "--split", "val"]) == 0
    assert f"page  {URL}/external/elsewhere/report.html\n" in capsys.readouterr().out

    before = [info.path for info in store.files()]
    with held_lease(store, owner="a colleague", ttl_s=0.4):
        for more in (asked, ["--split", "test"]):
            assert run(["evaluate", URL, *map(str, more)]) == 2
            errors = _errors(capsys)
            assert errors[-1].startswith(
                f"error: {URL}: a colleague is writing in this run folder; wait for it or stop it"
            )
    after = [info.path for info in store.files()]
    assert [path for path in after if "/.lease/" not in path] == [path for path in before if "/.lease/" not in path]
    assert len(store.sibling("test_openings").files()) == 1  # nobody has looked at test meanwhile


def _errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert "medtl-run-" not in text  # no temporary folder
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_mistakes_are_one_line_each(place: Place, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "stores"
    shutil.copytree(place.stores.root, root)
    monkeypatch.setattr(place.stores, "root", root)
    runs = root / "bucket" / "runs"
    for name in ("unfinished", "chain", "ensemble", "damaged"):
        shutil.copytree(runs / "first", runs / name)
    (runs / "unfinished" / "results.json").unlink()
    (runs / "ensemble" / "ensemble.json").write_text('{"members": ["folds/0"]}')
    weights = next((runs / "damaged" / "checkpoints").glob("*/frozen.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    config = (runs / "chain" / "config.yaml").read_text()
    assert "  stages: []\n" in config
    (runs / "chain" / "config.yaml").write_text(
        config.replace("  stages: []\n", "  stages:\n  - {name: a}\n  - {name: b}\n")
    )
    out = str(tmp_path / "out.parquet")
    before = sorted(root.rglob("*"))

    def fails(code: int, words: str, url: str, commands: str = "predict export compare external evaluate") -> None:
        typed = {
            "predict": ["predict", url, str(place.root / "images"), "--out", out],
            "export": ["export", url, "--out", out],
            "compare": ["compare", OTHER, url],
            "external": ["evaluate", url, "--data", str(place.root / "elsewhere")],
            "evaluate": ["evaluate", url],
        }
        for command in commands.split():
            assert run(typed[command]) == code, command
            (line,) = _errors(capsys)
            assert words in line, line

    fails(2, "s3://bucket/runs/none is not a run folder: it has no config.yaml", "s3://bucket/runs/none")
    fails(2, "s3://bucket/runs/unfinished: the run has not finished;", "s3://bucket/runs/unfinished")
    fails(2, "s3://bucket/runs/chain holds a chain of trainings; name one", "s3://bucket/runs/chain")
    fails(2, "s3://bucket/runs/ensemble/folds/0 is not a run folder", "s3://bucket/runs/ensemble", "predict")
    fails(2, "s3://bucket/runs/ensemble holds several runs", "s3://bucket/runs/ensemble", "export external evaluate")
    fails(3, "/frozen.safetensors: differs from its checksum", "s3://bucket/runs/damaged", "predict export")
    fails(2, "a web server can only be read from", "https://127.0.0.1/run")
    fails(2, "must hold no user", "s3://key:secret@bucket/run")
    place.stores.gone = True
    try:
        fails(75, f"{OTHER}", OTHER)
    finally:
        place.stores.gone = False
    assert sorted(root.rglob("*")) == before  # nor has any of them left a lease
    assert not Path(out).exists()


def test_no_room_for_the_copy_is_told(place: Place, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    words = re.escape(f"{scratch}: a temporary copy can't be written (No space left on device)")
    with pytest.raises(Interrupted, match=f"^{words}: free space there, or name another folder with TMPDIR"):
        scorable(folder_at(URL)).__enter__()


def test_a_stage_is_added_to_under_the_lease_of_its_chain(place: Place, tmp_path: Path) -> None:
    with stores_in(tmp_path / "stores") as stores:
        chain = stores.path("s3://bucket/runs/chain")
        shutil.copytree(place.stores.path(URL), chain / "stages" / "1-a", ignore=shutil.ignore_patterns(".lease"))
        shutil.copy(place.stores.path(URL) / "config.yaml", chain)
        with opened_finished("s3://bucket/runs/chain/stages/1-a", say=print) as folder:
            assert isinstance(folder, StoreFolder)
            assert (folder.fence, folder.leased_at) == (1, "s3://bucket/runs/chain")
            folder.part("external").write("note", b"x")
            rival = held_lease(stores.folder("s3://bucket/runs/chain"), owner="another", ttl_s=60.0, wait=False)
            with pytest.raises(UserError, match="is writing in this run folder"):
                rival.__enter__()
        assert (chain / "stages" / "1-a" / "external" / "note").read_bytes() == b"x"
        assert not (chain / "stages" / "1-a" / ".lease").exists()
