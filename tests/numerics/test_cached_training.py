"""Training with the frozen layers' outputs kept equals training without, bit for bit: losses, curves, scores, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from kept_weights import weights_in
from ranks import run_ranks
from shard_sets import write_set
from tiny_backbone import tiny_registered

from medtl_dist.config import Config, load_config
from medtl_dist.data.pieces import Reader
from medtl_dist.errors import Interrupted
from medtl_dist.models import registry
from medtl_dist.models.backbones import create_model
from medtl_dist.models.freezing import freeze
from medtl_dist.models.split import between, split
from medtl_dist.run import Folder, LocalRun, Signal
from medtl_dist.train import loop, prefix_cache
from medtl_dist.train.loop import fit
from medtl_dist.train.prefix_plan import plan_groups
from medtl_dist.train.prefix_store import Store
from medtl_dist.train.setup import open_shards
from medtl_dist.train.warm import Warm

_TIMES = ("images_per_s", "data_wait_fraction", "epoch_s", "data_wait_s", "compute_s", "communication_s")
_TIMES += ("evaluation_s", "checkpoint_s", "prefix_cache_s")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """26 training and 14 validation images, in several shards of unequal size."""
    folder = tmp_path_factory.mktemp("cached") / "set"
    write_set(folder, {"train": [11, 9, 6], "val": [9, 5], "test": [7]})
    return str(folder)


@pytest.fixture(autouse=True)
def _tiny():
    with tiny_registered():
        yield


def _config(shards: str, *overrides: str) -> Config:
    fixed = ("train.epochs=3", "train.threads=1", "model.backbone=tiny_dropout", "model.frozen_depth=3")
    fixed += ("data.global_batch_size=6", "augment.views=2", "evaluate.bootstrap_samples=20", "train.seed=3")
    return load_config(preset="smoke", overrides=[f"data.shards={shards}", *fixed, *overrides])


class _StoppedRun(LocalRun):
    """Told to stop at the n-th poll."""

    stop_at_poll: int | None = None
    polls: int = 0

    def poll(self) -> Signal:
        self.polls += 1
        if self.polls == self.stop_at_poll:
            self.received = 15
        return super().poll()


def _run(folder: Path, rank: int = 0, world_size: int = 1) -> _StoppedRun:
    return _StoppedRun(Folder.local(folder), torch.device("cpu"), rank=rank, world_size=world_size, local_rank=rank)


@contextlib.contextmanager
def _watched():
    """(loss, keys, whether it began at the boundary) of each step made inside."""
    seen: list[tuple[float, tuple[str, ...], bool]] = []
    step = loop.train_step

    def watched(session, batch, weight, *more):
        loss, applied = step(session, batch, weight, *more)
        seen.append((float(loss), tuple(batch.keys), batch.at_boundary))
        return loss, applied

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", watched)
        yield seen


def _losses(config: Config, folder: Path, mode: Any, warm: Warm | None = None, **options: Any) -> list[Any]:
    """The losses and keys of each step of a training; they begin at the boundary if and only if the cache is on."""
    warm = warm or Warm(cache_dir=folder.parent / "kept", cache_mode=mode)
    with _watched() as seen:
        fit(config, _run(folder), warm=warm, **options)
    warm.close()
    assert {at_boundary for _, _, at_boundary in seen} == {mode == "on"}
    return [(loss, keys) for loss, keys, _ in seen]


def _left_by(folder: Path) -> tuple[Any, ...]:
    """All numbers of a finished run: history, predictions, results and the last checkpoint's weights."""
    history = [
        {name: value for name, value in row.items() if name not in _TIMES}
        for row in pq.read_table(folder / "history.parquet").to_pylist()
    ]
    results = json.loads((folder / "results.json").read_text())
    kept = {name: results[name] for name in ("splits", "best_epoch", "epochs_run", "model", "headline")}
    last = sorted((folder / "checkpoints").iterdir())[-1]
    weights = {name: tensor.numpy().tobytes() for name, tensor in weights_in(last).items()}
    files = sorted((folder / "predictions").glob("*.parquet"))
    return history, kept, [pq.read_table(file).to_pylist() for file in files], weights


def _notes(folder: Path) -> str:
    return "\n".join(json.loads(line).get("text", "") for line in (folder / "log.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("model.frozen_depth=all", "train.ema_decay=0.6"),
        ("train.precision=bf16", "model.fold_frozen=true", "data.sampling=class"),
        ("train.channels_last=false", "train.accumulation_steps=2", "evaluate.views=mirror"),
        ("model.frozen_depth=5", "train.unfreeze={1: 2}"),
        ("model.frozen_depth=1", "train.precision=bf16", "train.activation_checkpointing=true"),
    ],
    ids=" ".join,
)
def test_the_cache_changes_no_bit(tmp_path: Path, extra: tuple[str, ...]) -> None:
    folder = tmp_path / "set"
    dataset = write_set(folder, {"train": [11, 9, 6], "val": [9, 5], "test": [7]})
    if "data.sampling=class" in extra:
        _count_classes(folder, dataset)
    config = _config(str(folder), *extra)
    off = _losses(config, tmp_path / "off", "off", open_test=True)
    on = _losses(config, tmp_path / "on", "on", open_test=True)
    assert len(off) >= 12
    assert on == off  # exact equality of every loss
    assert _left_by(tmp_path / "on") == _left_by(tmp_path / "off")


def _count_classes(folder: Path, dataset: Any) -> None:
    info, first = dataset.info, 0
    for shard in info["splits"]["train"]["shards"]:
        odd = sum(number % 2 for number in range(first, first + shard["samples"]))
        shard["classes"] = dict(zip(info["classes"], (shard["samples"] - odd, odd), strict=True))
        first += shard["samples"]
    info["splits"]["train"]["classes"] = dict.fromkeys(info["classes"], 13)
    (folder / "dataset.json").write_text(json.dumps({key: value for key, value in info.items() if key != "name"}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resnet_too(shards: str, tmp_path: Path, precision: str) -> None:
    config = _config(
        shards, "model.backbone=resnet18", "model.frozen_depth=4", "train.epochs=1", f"train.precision={precision}"
    )
    assert _losses(config, tmp_path / "on", "on") == _losses(config, tmp_path / "off", "off")
    assert _left_by(tmp_path / "on") == _left_by(tmp_path / "off")


def test_a_norm_folded_across_the_boundary_is_part_of_it(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first convolution is a stage of its own and its norm is in the next: folded while both are frozen, not later."""
    tiny = registry.spec("tiny_dropout")
    stages = (("conv1",), ("bn1", "layer1"), *((f"layer{number}",) for number in (2, 3, 4)))
    monkeypatch.setitem(registry._BACKBONES, "across", dataclasses.replace(tiny, name="across", stages=stages))
    config = _config(
        shards, "model.backbone=across", "model.fold_frozen=true", "model.frozen_depth=3", "train.unfreeze={1: 1}",
        "augment.views=1",
    )  # fmt: skip
    assert _losses(config, tmp_path / "on", "on") == _losses(config, tmp_path / "off", "off")
    assert _left_by(tmp_path / "on") == _left_by(tmp_path / "off")
    assert len(list((tmp_path / "kept").rglob("data.bin"))) == 4  # train and val, before and after


def _on_and_off(rank: int, world_size: int, config: Config, folder: str) -> list[list[Any]]:
    with tiny_registered():
        found = []
        for mode in ("off", "on"):
            warm = Warm(cache_dir=Path(folder) / "kept", cache_mode=mode)  # type: ignore[arg-type]
            with _watched() as seen:
                fit(config, _run(Path(folder) / mode, rank, world_size), warm=warm)
            warm.close()
            assert {at_boundary for _, _, at_boundary in seen} == {mode == "on"}
            found.append([(loss, keys) for loss, keys, _ in seen])
        return found


def test_two_ranks_fill_it_together_and_change_no_bit(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(shards, "data.global_batch_size=5", "train.unfreeze={2: 2}")  # 2 and 3 images a step
    for off, on in run_ranks(2, _on_and_off, config, str(tmp_path)):
        assert on == off
        assert len(on) == 15
    assert _left_by(tmp_path / "on") == _left_by(tmp_path / "off")


def test_nothing_is_read_once_it_is_kept(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(shards)
    first = _losses(config, tmp_path / "first", "on")

    def read(*_: Any) -> Any:
        raise AssertionError("an image was read")

    monkeypatch.setattr(Reader, "read", read)
    assert _losses(config, tmp_path / "second", "on") == first
    assert _left_by(tmp_path / "second") == _left_by(tmp_path / "first")
    assert "0 of 3 entries are new" in _notes(tmp_path / "second")


def test_stopped_and_resumed_with_the_cache_equals_undisturbed_without(shards: str, tmp_path: Path) -> None:
    config = _config(shards)
    fit(config, _run(tmp_path / "whole"))
    # The polls: chunks of the first epoch's entry, after a step, at the epoch's end, chunks of the next one's entry, …
    for number in (1, 2, 4, 6):
        folder = tmp_path / f"stopped-{number}"
        stopped = _run(folder)
        stopped.stop_at_poll = number
        warm = Warm(cache_dir=tmp_path / f"kept-{number}", cache_mode="on")
        with pytest.raises(Interrupted):
            fit(config, stopped, warm=warm)
        fit(config, _run(folder), warm=warm)
        warm.close()
        assert _left_by(folder) == _left_by(tmp_path / "whole")


def test_a_damaged_chunk_is_told_and_computed_again(shards: str, tmp_path: Path) -> None:
    config = _config(shards)
    off = _losses(config, tmp_path / "off", "off")
    _losses(config, tmp_path / "first", "on")
    for data in (tmp_path / "kept").rglob("data.bin"):
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 8
        data.write_bytes(raw)
    assert _losses(config, tmp_path / "again", "on") == off
    assert _notes(tmp_path / "again").count("was damaged and is computed again") == 3  # two views and val
    assert _left_by(tmp_path / "again") == _left_by(tmp_path / "off")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_deeper_prefix_from_a_shallower_one_is_the_same(
    shards: str, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = (f"train.precision={precision}", "train.epochs=1")
    deep = _config(shards, "model.frozen_depth=4", *extra)
    _losses(deep, tmp_path / "direct" / "deep", "on")
    _losses(_config(shards, "model.frozen_depth=2", *extra), tmp_path / "shallow", "on")

    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("an image was read")

    monkeypatch.setattr(prefix_cache, "rows_batches", read)
    _losses(deep, tmp_path / "deep", "on")
    kept = [_contents(folder / "kept") for folder in (tmp_path / "direct", tmp_path)]
    assert len(kept[0]) == 2
    assert kept[0].items() <= kept[1].items()


def _contents(folder: Path) -> Mapping[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.rglob("data.bin")}


def test_what_it_holds_is_what_was_planned(shards: str, tmp_path: Path) -> None:
    configs = [_config(shards, "train.epochs=1"), _config(shards, "optim.lr=0.1"), _config(shards, "train.seed=4")]
    groups = plan_groups(configs, open_shards(configs[0]))
    assert [group.trials for group in groups] == [(0, 1), (2,)]
    for number, config in enumerate(configs[:2]):
        _losses(config, tmp_path / str(number), "on")
    assert Store(tmp_path / "kept").used() == groups[0].bytes


@pytest.mark.parametrize(
    ("overrides", "options", "told"),
    [
        (("augment.views=null",), {}, "augment.views is null"),
        (("augment.mixup_alpha=0.2",), {}, "mixup and cutmix"),
        (("train.unfreeze={1: 0}",), {}, "no stage is frozen in every epoch"),
        (("model.frozen_depth=1", "data.image_size_px=400"), {"cache_limit_mib": 1}, "would not fit"),
        (("train.epochs=1",), {"cache_mode": "auto"}, "would not pay"),
    ],
)
def test_why_it_is_off_is_told(
    shards: str, tmp_path: Path, overrides: tuple[str, ...], options: dict[str, Any], told: str
) -> None:
    config = _config(shards, "train.epochs=2", *overrides)
    given: dict[str, Any] = {"cache_mode": "on"} | options
    warm = Warm(cache_dir=tmp_path / "kept", **given)
    _losses(config, tmp_path / "run", "off", warm)
    assert f"prefix cache off: {told}" in _notes(tmp_path / "run")


def test_auto_counts_with_the_trainings_to_come(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "_seconds_per_image", lambda prefix: 0.01)
    config = _config(shards, "train.epochs=1")
    warm = Warm(cache_dir=tmp_path / "kept", cache_trials=2)
    _losses(config, tmp_path / "run", "on", warm)


def test_a_full_disk_is_told_and_training_goes_on(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_cache.Entry, "_write", full)
    warm = Warm(cache_dir=tmp_path / "kept", cache_mode="on")
    _losses(_config(shards, "train.epochs=1"), tmp_path / "run", "off", warm)
    assert "can't be written (No space left on device)" in _notes(tmp_path / "run")


def test_a_warm_process_trains_the_same_bits(shards: str, tmp_path: Path) -> None:
    warm = Warm(cache_dir=tmp_path / "kept", cache_mode="on")
    for number, overrides in enumerate([("model.frozen_depth=2",), (), ("optim.lr=0.1",), ()]):
        config = _config(shards, *overrides)
        fit(config, _run(tmp_path / f"warm-{number}"), warm=warm)
        if number != 1:
            fit(config, _run(tmp_path / f"cold-{number}"))
            assert _left_by(tmp_path / f"warm-{number}") == _left_by(tmp_path / f"cold-{number}")
    warm.close()
    assert _left_by(tmp_path / "warm-1") == _left_by(tmp_path / "warm-3")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("depth", [2, 4, 5])
def test_frozen_layers_give_an_image_the_same_bits_in_any_place_of_a_fixed_shape(autocast: bool, depth: int) -> None:
    """What exactness rests on, as far as this processor goes: the shape of what is computed at once matters, nothing else."""
    native = registry.native_normalisation(registry.spec("resnet18"), 1)
    created = create_model(
        "resnet18", num_outputs=2, in_channels=1, weights="random", normalisation=native, image_size_px=64, seed=1
    )
    freeze(created.model, created.spec, depth)
    created.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    prefix = split(created.model, created.spec, depth).prefix
    drawn = torch.rand(16, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 4 - 2
    images = torch.empty(drawn.shape, memory_format=torch.channels_last).copy_(drawn)
    places = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    alone = torch.zeros_like(images[:8])
    alone[3] = images[11]
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        ordered = torch.cat([prefix(images[:8]), prefix(images[8:])])
        mixed = torch.cat([prefix(images[places][:8]), prefix(images[places][8:])])
        assert torch.equal(mixed, ordered[places])
        assert torch.equal(prefix(alone)[3], ordered[11])
        first = split(created.model, created.spec, 1).prefix
        rest = between(created.model, created.spec, 1, depth)
        assert torch.equal(rest(first(images[:8])), ordered[:8])
