"""The craft of fine-tuning inside the loop: averages, mixing, unfreezing and checkpoints against independent references."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dying_runs import Killed, assert_same_bits, last_weights, run_in, small_config
from ranks import run_ranks
from shard_sets import write_set
from tiny_backbone import tiny_registered
from torch import nn

from medtl_dist.config import Config
from medtl_dist.data.stream import eval_batches
from medtl_dist.errors import UserError
from medtl_dist.models.freezing import freeze
from medtl_dist.models.normalise import normalise
from medtl_dist.run import Folder
from medtl_dist.train import checkpoint, loop, optim, setup, unfreeze
from medtl_dist.train.clock import ACTIVITIES
from medtl_dist.train.evaluate import score_split, views_of
from medtl_dist.train.loop import fit
from medtl_dist.train.session import Session
from medtl_dist.train.start import start


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """26 training and 14 validation images, in several shards of unequal size."""
    folder = tmp_path_factory.mktemp("craft") / "set"
    write_set(folder, {"train": [11, 9, 6], "val": [9, 5]})
    return str(folder)


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny_registered():
        yield


def test_the_average_of_the_weights_is_what_is_scored_and_kept(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, np.ndarray]] = []
    step = loop.train_step

    def watched(session, batch, weight, *more):
        loss = step(session, batch, weight, *more)
        seen.append({name: t.double().numpy().copy() for name, t in session.network.model.state_dict().items()})
        return loss

    monkeypatch.setattr(loop, "train_step", watched)
    decay = 0.7
    config = small_config(shards, f"train.ema_decay={decay}", "optim.lr=0.05", "train.epochs=1")
    fit(config, run_in(tmp_path))
    factors = np.array([decay ** (len(seen) - 1 - i) for i in range(len(seen))])
    kept, state, _ = checkpoint.load(Folder.local(tmp_path), 4)
    for name, tensor in kept.items():
        if tensor.is_floating_point():
            expected = sum(f * one[name] for f, one in zip(factors / factors.sum(), seen, strict=True))
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-4, atol=1e-6, err_msg=name)
            np.testing.assert_array_equal(state["learning_weights"][name].numpy(), seen[-1][name].astype(np.float32))
    # Scored: the val loss of the history is that of the kept weights, computed here by hand.
    session = start(config, run_in(tmp_path))
    session.loader.close()
    session.journal.close()
    model, scorer = session.network.model, session.scorer
    model.load_state_dict(kept)
    model.eval()
    losses = []
    with torch.no_grad():
        for batch in eval_batches(session.dataset, "val", transform=scorer.transform, batch_size=scorer.batch_size):
            outputs = model(normalise(batch.images, scorer.normalisation))[: batch.num_real]
            losses += torch.nn.functional.cross_entropy(outputs, batch.labels, reduction="none").tolist()
    (row,) = pq.read_table(tmp_path / "history.parquet").to_pylist()
    assert row["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


_RECOMPUTED = ("train.activation_checkpointing=true",)


@tiny_registered()
def _epoch_with_frozen_norms(rank: int, world_size: int, config: Config, folder: str) -> dict[str, np.ndarray]:
    """One epoch with every BatchNorm in eval, so that an image's gradient does not depend on its neighbours."""
    session = start(config, run_in(Path(folder) / f"of-{world_size}-{config.sha256()[:6]}", rank, world_size))
    for module in session.network.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    loop.train_epoch(session)
    session.loader.close()
    session.journal.close()
    return {name: t.detach().numpy().copy() for name, t in session.network.model.state_dict().items()}


_LOSS = ("train.loss=focal", "train.class_weights={PNEUMONIA: 3}", "train.label_smoothing=0.1")
_MIXING = ("augment.mixup_alpha=0.4", "augment.cutmix_alpha=1", "data.lanes=5", "data.global_batch_size=10")


def test_two_stains_in_grey_images_are_refused(shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stain_model = hematoxylin_eosin needs RGB"):
        fit(small_config(shards, "augment.name=histology"), run_in(tmp_path))


_EVERYTHING = (
    *("model.backbone=tiny_dropout", "train.activation_checkpointing=true"),
    *("train.ema_decay=0.8", "train.unfreeze={1: 3, 2: 0}", "model.frozen_depth=all", "train.epochs=3"),
    *("train.checkpoint_every_steps=9", "optim.layer_decay=0.7", "optim.clip_norm=1"),
    *("optim.decay_norms_and_biases=false", "augment.mixup_alpha=0.4", "augment.cutmix_alpha=1", "train.loss=focal"),
)


@tiny_registered()
def _whole_and_twice_killed(rank: int, world_size: int, config: Config, folder: str) -> None:
    """4 steps an epoch, checkpoints after 4, 8, 9 and 12. Killed at step 5, just after stages were unfrozen; resumed, and
    killed at step 10, whose last checkpoint lies within the epoch."""
    fit(config, run_in(Path(folder) / "whole", rank, world_size))
    for poll, newest in ((2, 4), (3, 9)):
        killed = run_in(Path(folder) / "killed", rank, world_size)
        killed.die_at_poll = poll
        with pytest.raises(Killed):
            fit(config, killed)
        assert checkpoint.steps(killed.folder)[-1] == newest
    fit(config, run_in(Path(folder) / "killed", rank, world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_run_of_everything_killed_twice_equals_the_whole_one_bit_for_bit(
    shards: str, tmp_path: Path, world_size: int
) -> None:
    config = small_config(shards, *_EVERYTHING)
    if world_size == 1:
        _whole_and_twice_killed(0, 1, config, str(tmp_path))
    else:
        run_ranks(world_size, _whole_and_twice_killed, config, str(tmp_path))
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
    _, one, _ = checkpoint.load(Folder.local(tmp_path / "whole"), 12)
    _, other, _ = checkpoint.load(Folder.local(tmp_path / "killed"), 12)
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    for name, tensor in one["learning_weights"].items():
        assert torch.equal(tensor, other["learning_weights"][name]), name


def _trained_in_place(config: Config, folder: Path, *, reference: bool) -> list[dict[str, torch.Tensor]]:
    """The model's state after each epoch; as a ``reference``, with one optimiser that holds all parameters from the start
    and passes over those without a gradient."""
    session = start(config, run_in(folder))
    network = session.network
    if reference:
        network.model.requires_grad_(True)
        groups = optim.parameter_groups(config.optim, network.model, network.spec)
        session.optimizer = optim.create_optimizer(config.optim, groups)
        freeze(network.model, network.spec, network.frozen_depth)
    states = [{name: tensor.clone() for name, tensor in network.model.state_dict().items()}]
    for _ in range(config.train.epochs):
        loop.close_epoch(session, loop.train_epoch(session))
        states.append({name: tensor.clone() for name, tensor in network.model.state_dict().items()})
    session.loader.close()
    session.journal.close()
    return states


def test_unfreezing_keeps_the_state_of_what_learns_and_begins_with_none(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("train.unfreeze={1: 4, 2: 1}", "model.frozen_depth=5", "train.epochs=3", "optim.layer_decay=0.5")
    config = small_config(shards, *options, "optim.name=adamw")
    found = _trained_in_place(config, tmp_path / "ours", reference=False)

    def freeze_only(session: Session) -> None:
        spec = session.network.spec
        freeze(session.network.model, spec, unfreeze.depth_at(config, spec, session.position.epoch))

    monkeypatch.setattr(loop, "unfreeze", freeze_only)
    expected = _trained_in_place(config, tmp_path / "reference", reference=True)
    for ours, reference in zip(found, expected, strict=True):
        assert all(torch.equal(tensor, reference[name]) for name, tensor in ours.items())
    # What moves in each epoch is what is not frozen in it, running statistics included.
    for epoch, still in enumerate((("conv1", "bn1", "layer"), ("conv1", "bn1", *_LAYERS[:3]), ("conv1", "bn1"))):
        for name, tensor in found[epoch].items():
            assert torch.equal(tensor, found[epoch + 1][name]) == name.startswith(still), (epoch, name)


_LAYERS = ("layer1", "layer2", "layer3", "layer4")


@tiny_registered()
def _unfrozen_with_frozen_norms(rank: int, world_size: int, config: Config, folder: str) -> dict[str, np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False))
        place = Path(folder) / f"of-{world_size}"
        fit(config, run_in(place, rank, world_size))
    weights = last_weights(place)
    return {name: tensor.numpy() for name, tensor in weights.items()}


def _both(rank: int, world_size: int, mixing: Config, unfreezing: Config, folder: str) -> list[dict[str, np.ndarray]]:
    return [
        _epoch_with_frozen_norms(rank, world_size, mixing, f"{folder}/mixing"),
        _unfrozen_with_frozen_norms(rank, world_size, unfreezing, f"{folder}/unfreezing"),
    ]


def test_unequal_ranks_mix_weigh_and_unfreeze_as_one_process_does(shards: str, tmp_path: Path) -> None:
    # 5 lanes of 2 on 2 ranks: 4 and 6 images a step, each mixed as in one process; accumulation cuts them once more.
    mixing = small_config(
        shards, *_LOSS, *_MIXING, "train.accumulation_steps=2", "optim.layer_decay=0.5", "optim.lr=0.1", *_RECOMPUTED
    )
    unfreezing = small_config(shards, "train.unfreeze={1: 2}", "model.frozen_depth=all", "data.global_batch_size=9")
    alone = _both(0, 1, mixing, unfreezing, str(tmp_path))
    together = run_ranks(2, _both, mixing, unfreezing, str(tmp_path))
    for one, two, other in zip(alone, *together, strict=True):
        for name, values in one.items():
            # fp32 sums in another order, as in test_fit.py.
            np.testing.assert_allclose(two[name], values, rtol=1e-4, atol=2e-6, err_msg=name)
            assert np.array_equal(two[name], other[name])
    unmixed = _epoch_with_frozen_norms(0, 1, small_config(shards, *_LOSS, *_MIXING[2:], "optim.lr=0.1"), str(tmp_path))
    assert not np.allclose(alone[0]["fc.weight"], unmixed["fc.weight"], rtol=1e-3, atol=2e-5)


def test_stages_computed_twice_train_to_the_same_bits(shards: str, tmp_path: Path) -> None:
    """Running statistics and their counters, seen once per step, included; with the average's copy of the model."""
    options = ("train.ema_decay=0.9", "train.unfreeze={1: 1}", "model.frozen_depth=3", "train.precision=bf16")
    options += ("model.backbone=tiny_dropout",)
    fit(small_config(shards, *options), run_in(tmp_path / "kept"))
    fit(small_config(shards, *options, *_RECOMPUTED), run_in(tmp_path / "recomputed"))
    assert_same_bits(tmp_path / "kept", tmp_path / "recomputed")
    assert int(last_weights(tmp_path / "recomputed")["layer4.bn1.num_batches_tracked"]) == 8


def test_scores_of_views_are_means_over_views_made_by_hand(shards: str, tmp_path: Path) -> None:
    session = start(small_config(shards, "evaluate.views=right_angles"), run_in(tmp_path))
    scorer = session.scorer
    found = score_split(scorer, session.dataset, "val", rank=0, world_size=1)
    assert found is not None
    session.loader.close()
    session.journal.close()
    scorer.model.eval()
    expected: dict[str, np.ndarray] = {}
    batches = list(eval_batches(session.dataset, "val", transform=scorer.transform, batch_size=scorer.batch_size))
    for batch in batches:
        images = batch.images[: batch.num_real].numpy()
        views = [np.rot90(one, k, (2, 3)).copy() for one in (images, images[:, :, :, ::-1]) for k in range(4)]
        assert len({view.tobytes() for view in views}) == 8
        with torch.no_grad():
            outputs = [scorer.model(normalise(torch.from_numpy(view), scorer.normalisation)).numpy() for view in views]
        expected |= dict(zip(batch.keys, np.mean(outputs, axis=0), strict=True))
    for key, outputs in zip(found.keys, found.outputs, strict=True):
        np.testing.assert_allclose(outputs, expected[key], rtol=1e-5, atol=1e-6)
    images = batches[0].images
    assert [len(views_of(images, name)) for name in ("one", "mirror")] == [1, 2]
    assert torch.equal(views_of(images, "mirror")[1], images.flip(3))


def test_batch_norm_over_cpus_is_refused_and_one_process_has_nothing_to_synchronise(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = start(small_config(shards, "train.sync_batchnorm=true"), run_in(tmp_path)).network.model
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    monkeypatch.setattr(setup.collectives, "active", lambda: True)
    with pytest.raises(UserError, match=r"train\.sync_batchnorm = true needs a GPU"):
        setup.synchronised(model, torch.device("cpu"))
    converted = setup.synchronised(model, torch.device("cuda"))  # the conversion itself needs no GPU
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 5
    assert converted.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("unfreezing", "message"),
    [
        ("{2: 0}", r"epoch 2 never comes; train\.epochs = 2"),
        ("{1: 3}", "depth 3 unfreezes nothing, 3 of the 5"),
        ("{1: 9}", "depth 9 unfreezes nothing"),
    ],
)
def test_unfreezing_that_does_nothing_is_refused(shards: str, tmp_path: Path, unfreezing: str, message: str) -> None:
    config = small_config(shards, f"train.unfreeze={unfreezing}", "model.frozen_depth=3")
    with pytest.raises(UserError, match=message):
        fit(config, run_in(tmp_path))


def test_checkpoints_by_the_clock_and_where_the_time_goes(shards: str, tmp_path: Path) -> None:
    fit(small_config(shards, "train.epochs=1", "train.checkpoint_every_minutes=1e-9"), run_in(tmp_path))
    assert checkpoint.steps(Folder.local(tmp_path)) == [3, 4]  # the last two of 1, 2, 3 and the epoch's own
    assert [checkpoint.load_meta(Folder.local(tmp_path), step)["step"] for step in (3, 4)] == [3, 0]
    (row,) = pq.read_table(tmp_path / "history.parquet").to_pylist()
    spent = {name: row[f"{name}_s"] for name in ACTIVITIES}
    assert all(seconds > 0 for seconds in spent.values())
    # The row is made before the epoch's own checkpoint, whose time is added to it afterwards.
    assert sum(spent.values()) - spent["checkpoint"] <= row["epoch_s"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["throughput"]["seconds_per_epoch"] == spent
    assert row["data_wait_fraction"] == pytest.approx(spent["data_wait"] * row["images_per_s"] / 24)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_with_weighted_sampling_killed_twice_equals_the_whole_one_bit_for_bit(
    shards: str, tmp_path: Path, world_size: int
) -> None:
    asked = ("data.sampling=class", "data.sampling_weights={NORMAL: 1.7, PNEUMONIA: 0.4}")
    config = small_config(shards, *asked, "train.epochs=3", "train.checkpoint_every_steps=9")
    if world_size == 1:
        _whole_and_twice_killed(0, 1, config, str(tmp_path))
    else:
        run_ranks(world_size, _whole_and_twice_killed, config, str(tmp_path))
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
    cautions = json.loads((tmp_path / "whole" / "results.json").read_text())["cautions"]
    assert any("sampling by class" in caution and "calibrated" in caution for caution in cautions)
