"""The craft of fine-tuning inside the loop: averages, mixing, unfreezing and checkpoints against independent references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dying_runs import Killed, assert_same_bits, last_weights, run_in, small_config
from ranks import run_ranks
from shard_sets import write_set
from torch import nn

from medtl_dist.config import Config
from medtl_dist.data.stream import eval_batches
from medtl_dist.errors import UserError
from medtl_dist.models.normalise import normalise
from medtl_dist.run import Folder
from medtl_dist.train import checkpoint, loop
from medtl_dist.train.loop import fit
from medtl_dist.train.session import start


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """26 training and 14 validation images, in several shards of unequal size."""
    folder = tmp_path_factory.mktemp("craft") / "set"
    write_set(folder, {"train": [11, 9, 6], "val": [9, 5]})
    return str(folder)


def test_the_average_of_the_weights_is_what_is_scored_and_kept(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, np.ndarray]] = []
    step = loop.train_step

    def watched(session, batch, weight):
        loss = step(session, batch, weight)
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


def test_a_killed_run_resumes_its_average_to_the_bit(shards: str, tmp_path: Path) -> None:
    config = small_config(shards, "train.ema_decay=0.9")
    fit(config, run_in(tmp_path / "whole"))
    killed = run_in(tmp_path / "killed")
    killed.die_after_epoch = 0
    with pytest.raises(Killed):
        fit(config, killed)
    fit(config, run_in(tmp_path / "killed"))
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
    assert last_weights(tmp_path / "whole")


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


def test_unequal_ranks_with_mixed_labels_and_focal_loss_train_as_one_process(shards: str, tmp_path: Path) -> None:
    # 5 lanes of 2 on 2 ranks: 4 and 6 images a step, each mixed as in one process; accumulation cuts them once more.
    config = small_config(shards, *_LOSS, *_MIXING, "train.accumulation_steps=2", "optim.layer_decay=0.5")
    alone = _epoch_with_frozen_norms(0, 1, config, str(tmp_path))
    unmixed = _epoch_with_frozen_norms(0, 1, small_config(shards, *_LOSS, *_MIXING[2:]), str(tmp_path))
    together = run_ranks(2, _epoch_with_frozen_norms, config, str(tmp_path))
    assert not np.allclose(alone["fc.weight"], unmixed["fc.weight"], rtol=1e-4, atol=2e-6)
    for name, values in alone.items():
        # fp32 sums in another order, as in test_fit.py.
        np.testing.assert_allclose(together[0][name], values, rtol=1e-4, atol=2e-6, err_msg=name)
        assert np.array_equal(together[0][name], together[1][name])


def test_two_stains_in_grey_images_are_refused(shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stain_model = hematoxylin_eosin needs RGB"):
        fit(small_config(shards, "augment.name=histology"), run_in(tmp_path))
