"""Steps whose loss is not finite: left out as if they had not been, on all ranks, and the end of a run that has too many."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from dying_runs import assert_same_bits, last_weights, run_in, small_config
from ranks import run_ranks
from shard_sets import write_set
from tiny_backbone import tiny_registered
from torch import Tensor

from medtl_dist.config import Config
from medtl_dist.errors import Interrupted, TrainingError
from medtl_dist.run import Folder
from medtl_dist.train import checkpoint, losses, nonfinite
from medtl_dist.train.loop import fit, train_epoch
from medtl_dist.train.start import start
from medtl_dist.train.state import save


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """26 training images: four steps an epoch."""
    return str(write_set(tmp_path_factory.mktemp("nonfinite") / "set", {"train": [11, 9, 6], "val": [9, 5]}).folder)


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny_registered():
        yield


def _spoil(patch: pytest.MonkeyPatch, spoilt: Callable[[int], bool], value: float = float("nan")) -> None:
    """Make the loss of the steps (counted over the run, from 0) that ``spoilt`` names not finite, in this process."""
    loss_sum, calls = losses.loss_sum, iter(range(10**6))

    def sum_or_nan(*arguments: Any) -> Tensor:
        loss = loss_sum(*arguments)
        return loss * value if spoilt(next(calls)) else loss

    patch.setattr("medtl_dist.train.losses.loss_sum", sum_or_nan)


def _notes(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["text"] for line in lines if line["kind"] == "note"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_left_out_leaves_no_trace(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    _spoil(monkeypatch, lambda step: True, value)
    session = start(small_config(shards, "train.ema_decay=0.9", "optim.momentum=0.9"), run_in(tmp_path))
    before = {name: tensor.clone() for name, tensor in session.network.model.state_dict().items()}
    with pytest.raises(TrainingError):
        train_epoch(session)
    for name, tensor in session.network.model.state_dict().items():  # running statistics and counters are among them
        assert torch.equal(tensor, before[name]), name
    assert session.optimizer.state_dict()["state"] == {}
    assert session.ema is not None
    assert session.ema.num_updates == 0
    session.loader.close()
    session.journal.close()


def test_the_run_goes_on_after_single_steps_and_says_which(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, lambda step: step in (1, 2, 4, 6))
    fit(small_config(shards), run_in(tmp_path))
    history = pq.read_table(tmp_path / "history.parquet").to_pylist()
    assert [row["nonfinite_steps"] for row in history] == [2, 2]
    assert all(0 < row["train_loss"] < 10 for row in history)
    left_out = [note for note in _notes(tmp_path) if "left out" in note]
    assert len(left_out) == 4
    assert "epoch 0, step 1:" in left_out[0]
    assert all(len(note.rpartition("images: ")[2].split(", ")) == 6 for note in left_out)  # the whole batch


def test_too_many_in_a_row_end_the_run_with_step_images_and_last_checkpoint(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, lambda step: step >= 5)  # steps 1, 2 and 3 of the second epoch
    with pytest.raises(
        TrainingError, match=r"3 steps in a row, the last one epoch 1, step 3 \(images [0-9a-f]{32}"
    ) as it:
        fit(small_config(shards), run_in(tmp_path))
    assert "the last checkpoint, of step 4, is from before it" in it.value.message
    assert checkpoint.latest(Folder.local(tmp_path), lambda _: None) == 4


def test_a_row_is_counted_over_the_end_of_an_epoch_and_over_a_resume(shards: str, tmp_path: Path) -> None:
    config = small_config(shards, "train.checkpoint_every_steps=1")
    with pytest.MonkeyPatch.context() as patch:
        _spoil(patch, lambda step: step >= 3)
        run = run_in(tmp_path)
        run.stop_at_poll = 1  # after step 5: two of three
        with pytest.raises(Interrupted):
            fit(config, run)
    with pytest.MonkeyPatch.context() as patch:
        _spoil(patch, lambda step: True)
        with pytest.raises(TrainingError, match="3 steps in a row, the last one epoch 1, step 1"):
            fit(config, run_in(tmp_path))


def test_real_divergence_stops_too(shards: str, tmp_path: Path) -> None:
    config = small_config(shards, "optim.lr=1e30", "schedule.name=constant", "train.max_nonfinite_steps=1")
    with pytest.raises(TrainingError, match=r"not finite in a step: epoch 0, step \d .*there is no checkpoint"):
        fit(config, run_in(tmp_path))


def _spoilt_on_rank_1(rank: int, world_size: int, config: Config, folder: str) -> str:
    with tiny_registered(), pytest.MonkeyPatch.context() as patch:
        _spoil(patch, lambda step: rank == 1 and step >= 1)
        with pytest.raises(TrainingError) as caught:
            fit(config, run_in(folder, rank, world_size))
    return caught.value.message


def _left_out_on_both(rank: int, world_size: int, config: Config, folder: str) -> None:
    with tiny_registered(), pytest.MonkeyPatch.context() as patch:
        _spoil(patch, lambda step: step == 2 and rank == 1)
        fit(config, run_in(folder, rank, world_size))


def test_one_ranks_loss_stops_all_alike_and_names_its_images_only(shards: str, tmp_path: Path) -> None:
    config = small_config(shards)
    messages = run_ranks(2, _spoilt_on_rank_1, config, str(tmp_path))
    assert messages[0] == messages[1]
    assert len(messages[0].partition("(images ")[2].partition(")")[0].split(", ")) == 3  # of six


def test_a_resumed_run_that_left_steps_out_is_the_same_to_the_bit(shards: str, tmp_path: Path) -> None:
    config = small_config(shards, "train.checkpoint_every_steps=1")
    run_ranks(2, _left_out_on_both, config, str(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        _spoil(patch, lambda step: step == 2)
        fit(config, run_in(tmp_path / "one"))
        assert len(_notes(tmp_path / "one")) == len(_notes(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        _spoil(patch, lambda step: step == 2)
        run = run_in(tmp_path / "cut")
        run.stop_at_poll = 1  # after step 5, in the second epoch
        with pytest.raises(Interrupted):
            fit(config, run)
    fit(config, run_in(tmp_path / "cut"))
    assert_same_bits(tmp_path / "one", tmp_path / "cut")


def test_weights_that_are_not_finite_are_not_kept(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = start(small_config(shards), run_in(tmp_path))
    nonfinite.check_weights(session.network.model)
    torch.nn.init.constant_(next(session.network.model.parameters()), float("inf"))
    session.position.global_step = 7
    with pytest.raises(TrainingError, match=r"conv1\.weight is not finite"):
        save(session)
    assert checkpoint.steps(Folder.local(tmp_path)) == []
    session.loader.close()
    session.journal.close()


def test_finite_runs_are_untouched(shards: str, tmp_path: Path) -> None:
    fit(small_config(shards), run_in(tmp_path / "default"))
    fit(small_config(shards, "train.max_nonfinite_steps=1"), run_in(tmp_path / "strict"))
    weights = [last_weights(tmp_path / name) for name in ("default", "strict")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
