"""Training against independent references: an undisturbed run, one process, one big batch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from kept_weights import weights_in
from ranks import run_ranks
from safetensors.torch import save_file
from shard_sets import write_set
from torch import nn

from medtl_dist.config import Config, load_config
from medtl_dist.data.shards import read_split
from medtl_dist.data.stream import eval_batches
from medtl_dist.errors import DataError, Interrupted, TrainingError, UserError
from medtl_dist.models.backbones import create_model
from medtl_dist.models.normalise import Normalisation, normalise
from medtl_dist.run import Folder, LocalRun, Run, Signal
from medtl_dist.train import checkpoint
from medtl_dist.train.evaluate import score_split
from medtl_dist.train.loop import close_epoch, fit, train_epoch
from medtl_dist.train.start import start

_NUMBERS = ("epoch", "train_loss", "lr", "val_auc", "val_loss", "val_average_precision", "checkpoint")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """26 training and 14 validation images, in several shards of unequal size."""
    folder = tmp_path_factory.mktemp("fit") / "set"
    info = write_set(folder, {"train": [11, 9, 6], "val": [9, 5], "test": [7]}).info
    # Any unequal counts will do for balanced class weights; the references get the same.
    info["splits"]["train"]["classes"] = dict(zip(info["classes"], (20, 6), strict=True))
    (folder / "dataset.json").write_text(json.dumps(info))
    return str(folder)


def _config(shards: str, *overrides: str) -> Config:
    fixed = (
        "train.epochs=3",
        "train.threads=1",
        "optim.momentum=0.9",
        "schedule.name=cosine",
        "data.global_batch_size=6",
    )
    return load_config(preset="smoke", overrides=[f"data.shards={shards}", *fixed, *overrides])


class _Killed(BaseException):
    """What a SIGKILL leaves on disk: everything up to here, nothing after."""


class _DyingRun(LocalRun):
    """Dies in the report of an epoch, or is told to stop at the n-th poll."""

    die_after_epoch: int | None = None
    stop_at_poll: int | None = None
    polls: int = 0

    def report(self, metrics: Mapping[str, float | int | None]) -> None:
        super().report(metrics)
        if metrics["epoch"] == self.die_after_epoch:
            raise _Killed

    def poll(self) -> Signal:
        self.polls += 1
        if self.polls == self.stop_at_poll:
            self.received = 15
        return super().poll()


def _run(folder: Path, rank: int, world_size: int) -> _DyingRun:
    return _DyingRun(Folder.local(folder), torch.device("cpu"), rank=rank, world_size=world_size, local_rank=rank)


def _three_histories(rank: int, world_size: int, config: Config, folder: str) -> None:
    """The same run undisturbed, killed after its first epoch and resumed, and stopped within an epoch and resumed."""
    assert isinstance(_run(Path(folder), rank, world_size), Run)
    fit(config, _run(Path(folder) / "whole", rank, world_size))
    killed = _run(Path(folder) / "killed", rank, world_size)
    killed.die_after_epoch = 0
    with pytest.raises(_Killed):
        fit(config, killed)
    fit(config, _run(Path(folder) / "killed", rank, world_size))
    stopped = _run(Path(folder) / "stopped", rank, world_size)
    stopped.stop_at_poll = 2  # after epoch 0, then after step 5, the first of epoch 1
    with pytest.raises(Interrupted):
        fit(config, stopped)
    fit(config, _run(Path(folder) / "stopped", rank, world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_killed_and_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    shards: str, tmp_path: Path, world_size: int
) -> None:
    config = _config(shards, *(["model.backbone=timm/test_resnet"] if world_size == 3 else []))  # smaller, for the time
    if world_size == 1:
        _three_histories(0, 1, config, str(tmp_path))
    else:
        run_ranks(world_size, _three_histories, config, str(tmp_path))
    whole = tmp_path / "whole"
    weights = weights_in(whole / "checkpoints" / "00000012")
    history = pq.read_table(whole / "history.parquet").select(_NUMBERS)
    assert history.num_rows == 3
    for name in ("killed", "stopped"):
        other = tmp_path / name
        again = weights_in(other / "checkpoints" / "00000012")
        assert again.keys() == weights.keys()
        for key, tensor in weights.items():
            assert torch.equal(again[key], tensor), f"{name}: {key}"
        assert pq.read_table(other / "history.parquet").select(_NUMBERS) == history
        assert pq.read_table(other / "predictions" / "val.parquet") == pq.read_table(
            whole / "predictions" / "val.parquet"
        )
        entries = [json.loads((run / "results.json").read_text())["splits"] for run in (whole, other)]
        assert entries[0] == entries[1]


def test_a_stop_at_an_epochs_last_step_keeps_that_epochs_checkpoint(shards: str, tmp_path: Path) -> None:
    config = _config(
        shards, "data.global_batch_size=5"
    )  # 5 steps an epoch: the poll of step 5 is left to the epoch's end
    stopped = _run(tmp_path, 0, 1)
    stopped.stop_at_poll = 1
    with pytest.raises(Interrupted, match="after epoch 1"):
        fit(config, stopped)
    assert checkpoint.steps(Folder.local(tmp_path)) == [5]
    assert checkpoint.load_meta(Folder.local(tmp_path), 5)["step"] == 0
    fit(config, _run(tmp_path, 0, 1))
    assert (tmp_path / "results.json").is_file()


def test_a_lost_best_checkpoint_is_told(shards: str, tmp_path: Path) -> None:
    config = _config(shards, "train.seed=3")  # its best epoch is not the last, whose checkpoint a resume starts from
    fit(config, _run(tmp_path, 0, 1))
    best = json.loads((tmp_path / "results.json").read_text())["best_checkpoint"]
    assert best != checkpoint.steps(Folder.local(tmp_path))[-1]
    shutil.rmtree(tmp_path / "checkpoints" / f"{best:08d}")
    fit(config, _run(tmp_path, 0, 1))
    assert json.loads((tmp_path / "results.json").read_text())["best_checkpoint"] != best
    assert f"best checkpoint passed over: {tmp_path}/checkpoints/{best:08d}" in (tmp_path / "log.jsonl").read_text()


def _scores(rank: int, world_size: int, config: Config, folder: str) -> dict[str, list[float]] | None:
    session = start(config, _run(Path(folder), rank, world_size))
    session.loader.close()
    session.journal.close()
    predictions = score_split(session.scorer, session.dataset, "val", rank=rank, world_size=world_size)
    if predictions is None:
        return None
    return dict(zip(predictions.keys, predictions.outputs.tolist(), strict=True))


def test_a_checkpoint_scores_alike_at_every_world_size(shards: str, tmp_path: Path) -> None:
    config = _config(shards, "train.epochs=1")
    fit(config, _run(tmp_path, 0, 1))
    alone = _scores(0, 1, config, str(tmp_path))
    assert alone is not None
    assert len(alone) == 14
    for world_size in (2, 3):
        together = run_ranks(world_size, _scores, config, str(tmp_path))
        assert together[0] == alone  # key by key, every bit
        assert together[1:] == [None] * (world_size - 1)


def test_scores_are_the_models_in_eval_and_leave_it_as_it_was(shards: str, tmp_path: Path) -> None:
    session = start(_config(shards), _run(tmp_path, 0, 1))
    model, scorer = session.network.model, session.scorer
    train_epoch(session)  # BatchNorm statistics that are neither the initial ones nor a batch's
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predictions = score_split(scorer, session.dataset, "val", rank=0, world_size=1)
    assert predictions is not None
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    expected = {}
    with torch.no_grad():
        for batch in eval_batches(session.dataset, "val", transform=scorer.transform, batch_size=scorer.batch_size):
            outputs = model(normalise(batch.images, scorer.normalisation))
            expected |= dict(zip(batch.keys, outputs[: batch.num_real].numpy(), strict=True))
    for key, outputs in zip(predictions.keys, predictions.outputs, strict=True):
        np.testing.assert_allclose(outputs, expected[key], rtol=1e-5, atol=1e-6)
    session.loader.close()
    session.journal.close()


def _fit(rank: int, world_size: int, config: Config, folder: str) -> None:
    fit(config, _run(Path(folder), rank, world_size))


def test_frozen_stages_keep_every_bit_on_three_ranks(shards: str, tmp_path: Path) -> None:
    created = create_model(
        "resnet18",
        num_outputs=2,
        in_channels=1,
        weights="random",
        normalisation=Normalisation((0.449,), (0.226,)),
        seed=1,
    )
    given = created.model.state_dict()
    drawing = torch.Generator().manual_seed(0)
    for name, tensor in given.items():  # values that a mean over three ranks would move by a bit
        if "running" in name:
            middle, width = (1.0, 1.0) if "var" in name else (0.0, 0.2)
            tensor.copy_(middle + width * (torch.rand(tensor.shape, generator=drawing) - 0.5))
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, tmp_path / "w.safetensors")
    config = _config(
        shards,
        f"model.weights={tmp_path / 'w.safetensors'}",
        "model.frozen_depth=3",
        "train.epochs=1",
    )
    run_ranks(3, _fit, config, str(tmp_path / "run"))
    trained = weights_in(tmp_path / "run" / "checkpoints" / "00000004")
    frozen = [name for name in given if name.startswith(("conv1", "bn1", "layer1", "layer2"))]
    assert any("running_var" in name for name in frozen)
    for name in given:
        assert torch.equal(trained[name], given[name]) == (name in frozen), name


def _train_with_frozen_norms(rank: int, world_size: int, config: Config, folder: str) -> dict[str, np.ndarray]:
    """One epoch with every BatchNorm in eval, so that an image's gradient does not depend on its neighbours."""
    session = start(config, _run(Path(folder) / f"of-{world_size}-{config.sha256()[:6]}", rank, world_size))
    for module in session.network.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    close_epoch(session, train_epoch(session))
    session.loader.close()
    session.journal.close()
    weights = {name: t.detach().numpy().copy() for name, t in session.network.model.state_dict().items()}
    return weights | {"history": np.array([session.position.history[0][name] for name in ("train_loss", "val_loss")])}


# fp32 sums in another order: gradients differ by about 1e-6 of the largest, and four steps of 0.01 carry that over.
_RTOL, _ATOL = 1e-4, 2e-6


def _assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(other[name], values, err_msg=name, rtol=_RTOL, atol=_ATOL)


_WEIGHTED = ("train.class_weights=balanced", "train.label_smoothing=0.1", "optim.clip_norm=1")


@pytest.mark.parametrize(("world_size", "batch_size", "extra"), [(2, 9, ()), (3, 10, _WEIGHTED)])
def test_several_ranks_train_as_one_process_with_the_same_global_batch(
    shards: str, tmp_path: Path, world_size: int, batch_size: int, extra: tuple[str, ...]
) -> None:
    # 9 lanes on 2 ranks are 4 and 5 images a step, 10 lanes on 3 ranks are 3, 3 and 4.
    config = _config(shards, f"data.global_batch_size={batch_size}", "train.epochs=1", *extra)
    alone = _train_with_frozen_norms(0, 1, config, str(tmp_path))
    together = run_ranks(world_size, _train_with_frozen_norms, config, str(tmp_path))
    _assert_alike(alone, together[0])
    for other in together[1:]:
        for name, values in together[0].items():
            assert np.array_equal(other[name], values), name


def test_accumulation_is_one_large_batch(shards: str, tmp_path: Path) -> None:
    whole = _train_with_frozen_norms(0, 1, _config(shards, "train.epochs=1"), str(tmp_path))
    parts = _train_with_frozen_norms(
        0, 1, _config(shards, "train.epochs=1", "train.accumulation_steps=3"), str(tmp_path)
    )
    _assert_alike(whole, parts)


def test_bf16_trains_near_fp32(shards: str, tmp_path: Path) -> None:
    exact = _train_with_frozen_norms(0, 1, _config(shards, "train.epochs=1"), str(tmp_path))
    mixed = _train_with_frozen_norms(0, 1, _config(shards, "train.epochs=1", "train.precision=bf16"), str(tmp_path))
    assert mixed["conv1.weight"].dtype == np.float32
    # bf16 keeps 8 bits; its losses agree to about a percent.
    np.testing.assert_allclose(mixed["history"], exact["history"], rtol=0.02)
    assert not np.array_equal(mixed["fc.weight"], exact["fc.weight"])


def test_early_stopping_and_the_best_epoch_come_from_the_history(shards: str, tmp_path: Path) -> None:
    config = _config(shards, "train.epochs=9", "train.early_stop_epochs=1", "optim.lr=1e-9")
    fit(config, _run(tmp_path, 0, 1))
    results = json.loads((tmp_path / "results.json").read_text())
    history = pq.read_table(tmp_path / "history.parquet").to_pylist()
    assert results["stopped_early"] is True
    assert len(history) == results["epochs_run"] < 9
    aucs = [row["val_auc"] for row in history]
    assert results["best_epoch"] == max(range(len(aucs)), key=lambda e: (aucs[e], -history[e]["val_loss"]))
    assert [row["epoch"] for row in history if row["best"]] == [results["best_epoch"]]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.global_batch_size=64", "fewer"),
        ("data.shards=nowhere", "nowhere"),
        ("model.frozen_depth=6", "frozen_depth"),
        ("model.weights=absent.pth", r"absent\.pth"),
        ("model.backbone=resnet19", "resnet18"),
        ("data.global_batch_size=1", "BatchNorm"),
    ],
)
def test_a_users_mistake_is_one_clear_line(shards: str, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fit(_config(shards, override), _run(tmp_path, 0, 1))
    assert "\n" not in caught.value.message


def _meets_a_full_disk(rank: int, world_size: int, config: Config, folder: str) -> str:
    replace = os.replace

    def full(source: str, target: str) -> None:
        if "checkpoints/00000008" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medtl_dist.storage.os.replace", full)
        with pytest.raises(TrainingError) as caught:
            fit(config, _run(Path(folder), rank, world_size))
    return caught.value.message


def test_a_full_disk_stops_every_rank_and_loses_nothing(shards: str, tmp_path: Path) -> None:
    messages = run_ranks(2, _meets_a_full_disk, _config(shards), str(tmp_path))
    assert messages[0] == messages[1]
    assert "No space left on device" in messages[0]
    folder = Folder.local(tmp_path)
    assert checkpoint.latest(folder, lambda _: None) == 4  # the first epoch's
    fit(_config(shards), _run(tmp_path, 0, 1))  # and with space again it goes on


def _meets_damage(rank: int, world_size: int, config: Config, folder: str) -> str:
    with pytest.raises(DataError) as caught:
        fit(config, _run(Path(folder), rank, world_size))
    return caught.value.message


def test_one_ranks_bad_image_stops_every_rank_with_its_name(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]})
    row = read_split(dataset, "train", columns=["key", "shard", "offset", "size"]).to_pylist()[12]
    with (tmp_path / "set" / row["shard"]).open("r+b") as tar:
        tar.seek(row["offset"] + row["size"] // 2)
        byte = tar.read(1)
        tar.seek(-1, 1)
        tar.write(bytes([byte[0] ^ 1]))
    messages = run_ranks(2, _meets_damage, _config(dataset.folder), str(tmp_path / "run"))
    assert messages[0] == messages[1]
    assert row["key"].hex() in messages[0]
    assert row["shard"] in messages[0]
