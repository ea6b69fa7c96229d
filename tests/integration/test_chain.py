"""`medtl train` with transfer.stages: source, then target, on tiny sets and a tiny network, in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from shard_sets import write_set
from sklearn.metrics import roc_auc_score
from tiny_backbone import tiny_registered

from medtl_dist.cli.main import run
from medtl_dist.config import load_config
from medtl_dist.data.shards import open_dataset
from medtl_dist.data.stream import eval_batches
from medtl_dist.data.transforms import EvalTransform
from medtl_dist.models.normalise import normalise
from medtl_dist.run import Folder
from medtl_dist.train import loop
from medtl_dist.train.compare import Scored, at_unit, time_to_reach
from medtl_dist.train.setup import create_network, open_shards


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny_registered():
        yield


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source set, a target set of the same classes, and one of others."""
    place = tmp_path_factory.mktemp("sets")
    sizes = {"source": [20, 12], "target": [18], "other": [18]}
    for name, train in sizes.items():
        write_set(place / name, {"train": train, "val": [12], "test": [12]})
    info = json.loads((place / "other" / "dataset.json").read_text())
    info |= {"classes": ["BENIGN", "MALIGNANT"], "positive_class": "MALIGNANT"}
    (place / "other" / "dataset.json").write_text(json.dumps(info))
    return {name: place / name for name in sizes}


def _config(place: Path, stages: list[dict[str, Any]], **transfer: Any) -> Path:
    tree = {
        "data": {"image_size_px": 16, "global_batch_size": 6, "eval_batch_size": 6, "loader_workers": 0},
        "model": {"backbone": "tiny", "weights": "random"},
        "train": {"epochs": 2, "precision": "fp32", "threads": 1},
        "evaluate": {"bootstrap_samples": 20},
        "transfer": {"stages": stages} | transfer,
    }
    file = place / "chain.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def _stage(name: str, shards: Path, **sections: Any) -> dict[str, Any]:
    return {"name": name, "data": {"shards": str(shards)}} | sections


def _train(file: Path, folder: Path, *options: str) -> int:
    return run(["train", "--config", str(file), "--run-dir", str(folder), *options])


@pytest.fixture
def stages(sets: dict[str, Path]) -> list[dict[str, Any]]:
    return [_stage("source", sets["source"]), _stage("target", sets["target"], train={"epochs": 3})]


def _best(folder: Path) -> Path:
    step = json.loads((folder / "results.json").read_text())["best_checkpoint"]
    return folder / "checkpoints" / f"{step:08d}" / "model.safetensors"


def test_the_target_starts_from_the_sources_best_checkpoint(
    stages: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert _train(_config(tmp_path, stages), folder, "--json", "--test") == 0
    captured = capsys.readouterr()
    index = json.loads(captured.out)
    assert index == json.loads((folder / "chain.json").read_text())
    source, target = (folder / entry["folder"] for entry in index["stages"])
    assert (source.name, target.name, index["finished"]) == ("1-source", "2-target", True)
    assert "stage 2 of 2, target: starts from the best checkpoint of source (epoch " in captured.err
    assert "), its head too" in captured.err
    results = json.loads((target / "results.json").read_text())
    assert results["model"]["weights_sha256"] == hashlib.sha256(_best(source).read_bytes()).hexdigest()
    assert results["model"]["weights"] == f"checkpoint {int(_best(source).parent.name)} of run 1-source"
    assert results["epochs_run"] == 3
    for part in (source, target):
        assert (part / "report.html").is_file()
    # test: opened by the last stage alone, and counted beside the whole run
    assert "test" not in json.loads((source / "results.json").read_text())["splits"]
    assert results["test_openings"] == {"count": 1, "configurations": 1}
    assert (tmp_path / "test_openings.jsonl").is_file()
    # what the target began with is the source's model to the last bit
    config = load_config(file=target / "config.yaml")
    network = create_network(config, open_shards(config), device=torch.device("cpu"), rank=0)
    assert all((network.model.state_dict()[name] == tensor).all() for name, tensor in load_file(_best(source)).items())


def test_other_classes_get_a_new_head_on_the_same_backbone(sets: dict[str, Path], tmp_path: Path) -> None:
    stages = [
        _stage("source", sets["source"], train={"epochs": 1}),
        _stage("target", sets["other"], train={"epochs": 1}),
    ]
    folder = tmp_path / "run"
    assert _train(_config(tmp_path, stages), folder) == 0
    entry = json.loads((folder / "chain.json").read_text())["stages"][1]
    assert entry["origin"].endswith("a new head for other classes")
    config = load_config(file=folder / "stages" / "2-target" / "config.yaml")
    network = create_network(config, open_shards(config), device=torch.device("cpu"), rank=0)
    own, carried = network.model.state_dict(), load_file(_best(folder / "stages" / "1-source"))
    assert (own["layer1.conv1.weight"] == carried["layer1.conv1.weight"]).all()
    assert not (own["fc.weight"] == carried["fc.weight"]).any()


def test_an_interrupted_chain_goes_on_in_its_stage_and_ends_with_the_same_bits(
    stages: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _config(tmp_path, stages)
    assert _train(file, tmp_path / "whole") == 0
    close_epoch = loop.close_epoch

    def dying(session: Any, clock: Any) -> None:
        close_epoch(session, clock)
        if session.run.folder.path.endswith("2-target") and session.position.epoch == 2:
            raise SystemExit(9)

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "close_epoch", dying)
        with pytest.raises(SystemExit):
            _train(file, broken)
    assert not (broken / "stages" / "2-target" / "results.json").exists()
    assert json.loads((broken / "chain.json").read_text())["finished"] is False
    assert run(["status", str(broken)]) == 0
    assert "2-target: stopped" in capsys.readouterr().out
    before = (broken / "stages" / "1-source" / "results.json").stat().st_mtime_ns
    assert _train(file, broken) == 2  # not without --resume
    assert _train(file, broken, "--resume") == 0
    assert "1-source had already finished." in capsys.readouterr().err
    assert (broken / "stages" / "1-source" / "results.json").stat().st_mtime_ns == before
    for number in ("1-source", "2-target"):
        one, other = (load_file(_best(tmp_path / name / "stages" / number)) for name in ("whole", "broken"))
        assert all((one[key] == other[key]).all() for key in one)
    assert run(["status", str(broken)]) == 0
    assert capsys.readouterr().out.startswith("broken: finished")


def test_another_chain_is_refused_in_the_folder(
    stages: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [stage | {"train": {"epochs": 1}} for stage in stages]
    folder = tmp_path / "run"
    assert _train(_config(tmp_path, stages), folder) == 0
    stages[1] |= {"optim": {"lr": 0.5}}
    assert _train(_config(tmp_path, stages), folder, "--resume") == 2
    assert "holds a run of another config (transfer.stages:" in capsys.readouterr().err
    assert run(["evaluate", str(folder)]) == 2
    assert "holds a chain of trainings; name one of them: stages/1-source, stages/2-target" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_started_from(
    stages: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [stage | {"train": {"epochs": 1}} for stage in stages]
    folder, file = tmp_path / "run", _config(tmp_path, stages)
    assert _train(file, folder) == 0
    (folder / "stages" / "2-target" / "results.json").unlink()
    path = _best(folder / "stages" / "1-source")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert _train(file, folder, "--resume") == 3
    assert "model.safetensors: differs from its checksum" in capsys.readouterr().err


def test_a_later_stages_mistake_is_told_before_the_first_is_trained(
    sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [_stage("source", sets["source"]), _stage("target", tmp_path / "nowhere")]
    assert _train(_config(tmp_path, stages), tmp_path / "run") == 2
    assert "no shard set at" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def _compared(sets: dict[str, Path], place: Path, target: str, *options: str, **transfer: Any) -> dict[str, Any]:
    stages = [_stage("source", sets["source"], train={"epochs": 1}), _stage("target", sets[target])]
    file = _config(place, stages, compare=True, **transfer)
    assert _train(file, place / "run", *options) == 0
    return json.loads((place / "run" / "compare.json").read_text())


def _auc(folder: Path, split: str) -> float:
    table = pq.read_table(folder / "predictions" / f"{split}.parquet")
    return float(roc_auc_score(table.column("label").to_numpy(), table.column("logit_PNEUMONIA").to_numpy()))


def test_the_comparison_says_what_the_runs_say(
    sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _compared(sets, tmp_path, "target", "--test", seeds=[3, 4])
    text = capsys.readouterr().out
    assert [row["seed"] for row in found["seeds"]] == [3, 4]
    run_folder = tmp_path / "run"
    differences = []
    for row in found["seeds"]:
        alone, chain = (run_folder / row[which]["folder"] for which in ("alone", "chain"))
        one, other = (load_config(file=folder / "config.yaml") for folder in (alone, chain))
        assert one.train.seed == other.train.seed == row["seed"]
        assert (one.model.weights, one.transfer.stages) == ("random", [])
        same = {"weights", "keep_head"}
        assert one.model.model_dump(exclude=same) == other.model.model_dump(exclude=same)
        assert (one.data, one.optim, one.train) == (other.data, other.optim, other.train)
        assert row["comparison"]["auc_a"] == pytest.approx(_auc(alone, "test"))
        assert row["comparison"]["auc_b"] == pytest.approx(_auc(chain, "test"))
        assert row["source"]["auc_a"] == pytest.approx(_auc(chain.parent / "1-source", "val"))
        differences.append(row["comparison"]["difference"])
        goal = max(line["val_auc"] for line in pq.read_table(alone / "history.parquet").to_pylist())
        assert row["time"]["val_auc"] == goal
        assert f"source val AUC {row['source']['auc_a']:.3f} before, {row['source']['auc_b']:.3f} after" in text
    assert found["pooled"]["difference"] == pytest.approx(sum(differences) / 2)
    assert (found["split"], found["pooled"]["num_seeds"], found["cautions"]) == ("test", 2, [])
    assert "patient-clustered" in found["pooled"]["method"]
    assert f"AUC {found['pooled']['auc_a']:.3f} alone, {found['pooled']['auc_b']:.3f} with transfer" in text
    # two runs of the target set, each opened by its own configuration, beside the whole run
    ledger = (tmp_path / "test_openings.jsonl").read_text().splitlines()
    assert len(ledger) == 4
    # nothing is trained twice
    assert _train(tmp_path / "chain.yaml", run_folder, "--test", "--resume") == 0
    assert capsys.readouterr().err.count("had already finished.") == 6
    assert json.loads((run_folder / "compare.json").read_text()) == found
    assert run(["status", str(run_folder)]) == 0
    assert capsys.readouterr().out.startswith("run: finished")


def test_what_the_last_model_does_to_the_source_is_what_it_does_when_asked(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    """The source's val by the last model, image by image, against the comparison's number."""
    found = _compared(sets, tmp_path, "target")
    row = found["seeds"][0]
    assert (row["seed"], len(found["cautions"])) == (0, 2)
    last = tmp_path / "run" / row["chain"]["folder"]
    config = load_config(file=last / "config.yaml")
    dataset = open_dataset(sets["source"])
    network = create_network(config, dataset, device=torch.device("cpu"), rank=0)
    network.model.load_state_dict(load_file(_best(last)))
    network.model.eval()
    scores, labels = [], []
    for batch in eval_batches(dataset, "val", transform=EvalTransform(16), batch_size=1, rank=0, world_size=1):
        with torch.no_grad():
            logits = network.model(normalise(batch.images, network.normalisation))
        scores.append(float(logits[0, 1] - logits[0, 0]))
        labels.append(int(batch.labels[0]))
    assert row["source"]["auc_b"] == pytest.approx(roc_auc_score(labels, scores))


def test_other_classes_can_be_compared_but_nothing_is_said_of_the_source(sets: dict[str, Path], tmp_path: Path) -> None:
    found = _compared(sets, tmp_path, "other")
    assert found["seeds"][0]["source"] == {
        "reason": "the source has other classes than the target: the last model has no outputs for them"
    }
    assert found["pooled"]["difference"] is not None


def test_the_time_counts_what_came_before(tmp_path: Path) -> None:
    def history(name: str, aucs: list[float | None]) -> Folder:
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"epoch": i, "val_auc": auc, "epoch_s": 10.0} for i, auc in enumerate(aucs)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "history.parquet")
        return Folder.local(folder)

    alone = history("alone", [0.5, 0.7, 0.8, 0.75])
    early = time_to_reach(alone, history("early", [None, 0.8, 0.7]), before_s=5)
    assert early == {
        "val_auc": 0.8,
        "alone": {"epochs": 3, "seconds": 30},
        "chain": {"epochs": 2, "seconds": 20, "seconds_in_all": 25},
    }
    assert time_to_reach(alone, history("never", [0.7, 0.79]), before_s=5)["chain"] is None


def test_patients_are_compared_where_the_config_counts_patients() -> None:
    logits = np.array([[0.0, 1.0], [0.0, 3.0], [0.0, -1.0]])
    images = Scored(np.array(["k1", "k2", "k3"]), np.array([1, 1, 0]), logits, np.array(["a", "a", "b"]))
    found = at_unit(load_config(overrides=["evaluate.unit=patient"]), images)
    assert (list(found.keys), list(found.labels), found.groups, found.unit) == (["a", "b"], [1, 0], None, "patient")
    assert found.logits[:, 1] == pytest.approx([2, -1])
    assert at_unit(load_config(), images) is images


def test_two_networks_that_learned_apart_go_on_as_one(
    sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The study's method in small: extractor of the source, network of the target, both joined on source, then target."""
    joined = {"join": "concat", "backbone": "tiny_dropout", "second_backbone": "tiny"}
    once = {"train": {"epochs": 1}}
    stages = [
        _stage("extractor", sets["source"], **once),
        _stage("network", sets["target"], model={"backbone": "tiny_dropout", "weights": "random"}, **once),
        _stage(
            "joined-source", sets["source"],
            model=joined | {"weights": "stage:network", "second_weights": "stage:extractor"}, **once,
        ),
        _stage("joined-target", sets["target"], model=joined, **once),
    ]  # fmt: skip
    assert _train(_config(tmp_path, stages), tmp_path / "run", "--json") == 0
    entries = json.loads(capsys.readouterr().out)["stages"]
    assert entries[2]["model"]["backbone"] == "tiny_dropout+tiny"
    folders = [tmp_path / "run" / entry["folder"] for entry in entries]
    config = load_config(file=folders[2] / "config.yaml")
    began = create_network(config, open_shards(config), device=torch.device("cpu"), rank=0).model.state_dict()
    for prefix, folder in (("first", folders[1]), ("second", folders[0])):
        half = load_file(_best(folder))
        assert all((began[f"{prefix}.{name}"] == half[name]).all() for name in half if not name.startswith("fc"))
    config = load_config(file=folders[3] / "config.yaml")
    began = create_network(config, open_shards(config), device=torch.device("cpu"), rank=0).model.state_dict()
    assert all((began[name] == tensor).all() for name, tensor in load_file(_best(folders[2])).items())
    assert run(["evaluate", str(folders[3])]) == 0
