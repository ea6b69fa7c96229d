"""`medtl train` of a chain with `--run-dir s3://…` on a real S3 server: the same chain as on disk, through a kill and faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from dying_runs import assert_same_bits
from faulty_proxy import Fault, Proxy, Request
from s3_server import SECRET_KEY
from shard_sets import write_set
from stored_runs import copied

from cluster.job_files import framed, unframed
from medtl_dist.cli.main import run
from medtl_dist.store_folder import StoreFolder
from medtl_dist.train.lease import held_lease

pytestmark = [pytest.mark.store, pytest.mark.usefixtures("tiny_by_proxy")]
SOURCE, TARGET = "stages/1-source", "stages/2-target"
_CLOCK = ("seconds", "seconds_in_all")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """10 steps an epoch of the source, 6 of the target."""
    place = tmp_path_factory.mktemp("sets")
    trains = {"source": [40, 20], "target": [36]}
    sizes = {name: {"train": train, "val": [12], "test": [12]} for name, train in trains.items()}
    return {name: write_set(place / name, splits, size=(32, 32)).folder for name, splits in sizes.items()}


def _chain(sets: dict[str, str], place: Path, *, epochs: int = 2, **transfer: Any) -> Path:
    tree = {
        "data": {"image_size_px": 16, "global_batch_size": 6, "eval_batch_size": 6, "loader_workers": 0},
        "model": {"backbone": "tiny", "weights": "random", "frozen_depth": 1},  # a part of the weights lies apart
        "train": {"epochs": epochs, "precision": "fp32", "threads": 1, "checkpoint_every_steps": 3},
        "evaluate": {"bootstrap_samples": 20},
        "transfer": {"stages": [{"name": name, "data": {"shards": shards}} for name, shards in sets.items()]}
        | transfer,
    }
    file = place / "chain.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def command(file: Path, run_dir: str | Path, *more: str) -> list[str]:
    return ["train", "--config", str(file), "--run-dir", str(run_dir), *more]


def _timeless(tree: Any) -> Any:
    """A JSON value without what the clock said."""
    if isinstance(tree, dict):
        return {key: _timeless(value) for key, value in tree.items() if key not in _CLOCK}
    return [_timeless(value) for value in tree] if isinstance(tree, list) else tree


def _assert_same_chain(near: Path, store: StoreFolder, to: Path) -> None:
    for name in (SOURCE, TARGET):
        far = copied(store.part(name), to / name)
        assert_same_bits(near / name, far)
        told, again = (json.loads((place / "results.json").read_text()) for place in (near / name, far))
        for key in (
            "run",
            "splits",
            "headline",
            "threshold",
            "best_epoch",
            "best_checkpoint",
            "model",
            "test_openings",
        ):
            assert told[key] == again[key], key
    assert _timeless(json.loads((near / "chain.json").read_text())) == _timeless(json.loads(store.read("chain.json")))


def test_a_chain_in_a_store_is_the_chain_on_disk(
    sets: dict[str, str], place: str, store: StoreFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, near = _chain(sets, tmp_path), tmp_path / "near" / "first"
    assert run(command(file, near, "--test")) == 0
    capsys.readouterr()
    assert run(command(file, place, "--test")) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"chain {place}/chain.json"
    assert "stage 2 of 2, target: starts from the best checkpoint of source (epoch " in said.err
    _assert_same_chain(near, store, tmp_path / "far")
    for name in (SOURCE, TARGET):
        assert store.part(name).read("report.html").startswith(b"<!DOCTYPE html>")
        assert ".lease" not in store.part(name).names()  # the whole's protects it
    assert len(store.sibling("test_openings").files()) == 1
    for info in store.files():
        assert SECRET_KEY.encode() not in store.read(info.path.removeprefix(f"{store.path}/"))

    # a stage's config repeats it, and what it starts from is named by its address
    best = json.loads(store.part(SOURCE).read("results.json"))["best_checkpoint"]
    again = tmp_path / "again.yaml"
    again.write_bytes(store.part(TARGET).read("config.yaml"))
    weights = yaml.safe_load(again.read_text())["model"]["weights"]
    assert weights == f"{place}/{SOURCE}/checkpoints/{best:08d}-000001/model.safetensors"
    assert run(command(again, tmp_path / "again")) == 0
    assert_same_bits(near / TARGET, tmp_path / "again")

    # what a submitted job hands over, and what a person asks for
    handed = unframed(framed(store) or "")
    assert handed is not None
    assert json.loads(handed["chain.json"])["finished"] is True
    capsys.readouterr()
    assert run(["status", place, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["state"]) == ("first", "finished")
    assert [(part["run"], part["state"], len(part["epochs"])) for part in found["parts"]] == [
        ("1-source", "finished", 2),
        ("2-target", "finished", 2),
    ]
    assert found["parts"][1]["checkpoints"] == sorted(
        int(path.name) for path in (near / TARGET / "checkpoints").iterdir()
    )
    assert run(["evaluate", f"{place}/{TARGET}", "--split", "test"]) == 0
    assert "opened 2 times by 1 configuration\n" in capsys.readouterr().out
    assert run(["evaluate", place]) == 2
    assert f"{place} holds a chain of trainings; name one of them: {SOURCE}, {TARGET}." in capsys.readouterr().err


def test_sigkill_in_stage_2_then_the_same_command_equals_an_undisturbed_chain(
    sets: dict[str, str],
    place: str,
    store: StoreFolder,
    proxy: Proxy,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def states() -> tuple[str, list[str]]:
        capsys.readouterr()
        assert run(["status", place, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["state"], [part["state"] for part in found["parts"]]

    file = _chain(sets, tmp_path)
    assert run(command(file, tmp_path / "near")) == 0
    script = [sys.executable, str(Path(__file__).with_name("killed_run.py"))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    arguments = command(file, place, "--resume")
    killed = subprocess.run([*script, "3@2-target", "3", *arguments], check=False, timeout=120, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert store.part(TARGET).names("checkpoints") != []
    assert not store.part(TARGET).exists("results.json")
    with held_lease(store, owner="another", ttl_s=60.0):  # waits until the dead process's has run out
        assert states() == ("running", ["finished", "running"])
    assert states() == ("stopped", ["finished", "stopped"])

    source = store.part(SOURCE)
    before = {info.path: (info.mtime_ns, info.size) for info in source.files()}
    first = len(proxy.requests)
    assert run(arguments) == 0
    said = capsys.readouterr().err
    assert f"{place}/{SOURCE} had already finished." in said
    assert "resumed at epoch " in said
    assert {info.path: (info.mtime_ns, info.size) for info in source.files()} == before
    writes = [request for request in proxy.requests[first:] if request.method in ("PUT", "POST", "DELETE")]
    assert any(f"/{TARGET}/" in request.path for request in writes)
    assert not any(f"/{SOURCE}/" in request.path for request in writes)
    _assert_same_chain(tmp_path / "near", store, tmp_path / "far")
    assert store.part(TARGET).names("checkpoints")[-1].endswith("-000003")


def test_a_store_that_is_gone_between_stages_ends_the_chain_and_it_goes_on_later(
    sets: dict[str, str],
    place: str,
    store: StoreFolder,
    proxy: Proxy,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def gone_once_stage_2_has_begun(request: Request) -> Fault | None:
        return (
            Fault("reset")
            if proxy.count("2-target/config.yaml", "PUT") and "model.safetensors" in request.path
            else None
        )

    file = _chain(sets, tmp_path)
    impatient = ("--set", "data.storage_timeout_s=1", "--set", "data.storage_retries=1")
    proxy.choose = gone_once_stage_2_has_begun
    began = time.monotonic()
    assert run(command(file, place, *impatient)) == 75
    assert time.monotonic() - began < 60
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"error: {place}/{SOURCE}/checkpoints/")
    assert "with --resume goes on" in message
    proxy.choose = lambda request: None
    assert run(command(file, place, *impatient, "--resume")) == 0
    assert run(command(file, tmp_path / "near")) == 0
    _assert_same_chain(tmp_path / "near", store, tmp_path / "far")


def test_a_comparison_in_a_store_is_the_comparison_on_disk(
    sets: dict[str, str], place: str, store: StoreFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, near = _chain(sets, tmp_path, epochs=1, compare=True, seeds=[3, 4]), tmp_path / "near" / "first"
    assert run(command(file, near, "--test")) == 0
    assert run(command(file, place, "--test")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"comparison {place}/compare.json"
    told, again = json.loads((near / "compare.json").read_text()), json.loads(store.read("compare.json"))
    assert [row["source"]["auc_b"] is not None for row in told["seeds"]] == [True, True]
    assert _timeless(told) == _timeless(again)
    for row in told["seeds"]:
        for which in ("alone", "chain"):
            folder = row[which]["folder"]
            assert_same_bits(near / folder, copied(store.part(folder), tmp_path / "far" / folder))
    # two runs of the target for each seed, all beside the whole
    assert len(store.sibling("test_openings").files()) == 4
    assert run(["status", place, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], [part["run"] for part in found["parts"]]) == (
        "finished",
        ["1-source", "2-target", "1-source", "2-target", "alone", "alone"],
    )
    assert run(command(file, place, "--test", "--resume")) == 0
    assert capsys.readouterr().err.count("had already finished.") == 6
    assert json.loads(store.read("compare.json")) == again


def test_mistakes_are_one_line(
    sets: dict[str, str], place: str, store: StoreFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(code: int, part: str, *arguments: str) -> None:
        assert run(list(arguments)) == code
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert part in line

    file = _chain(sets, tmp_path, epochs=1)
    tree = yaml.safe_load(file.read_text())
    tree["transfer"]["stages"][0]["data"]["endpoint_url"] = "http://127.0.0.1:9"
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(tree))
    fails(2, "stage source: data.endpoint_url = http://127.0.0.1:9", *command(other, place))
    assert store.files() == []
    assert run(command(file, place)) == 0
    fails(2, "already holds a run", *command(file, place))
    fails(2, "train.epochs: 1 -> 2", *command(file, place, "--resume", "--set", "train.epochs=2"))
    tree["transfer"] = {}
    tree["data"]["shards"] = sets["target"]
    single = tmp_path / "single.yaml"
    single.write_text(yaml.safe_dump(tree))
    fails(2, f"{place}/{TARGET} is a part of the run {place}", *command(single, f"{place}/{TARGET}", "--resume"))

    source = store.part(SOURCE)
    best = json.loads(source.read("results.json"))["best_checkpoint"]
    name = f"checkpoints/{best:08d}-000001/model.safetensors"
    data = source.read(name)
    source.write(name, data[:-1] + bytes([data[-1] ^ 1]))
    store.part(TARGET).delete("results.json")
    fails(3, "model.safetensors: differs from its checksum", *command(file, place, "--resume"))
