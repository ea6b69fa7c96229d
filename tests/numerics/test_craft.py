"""The craft of fine-tuning inside the loop: averages, mixing, unfreezing and checkpoints against independent references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dying_runs import Killed, assert_same_bits, last_weights, run_in, small_config
from shard_sets import write_set

from medtl_dist.data.stream import eval_batches
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
