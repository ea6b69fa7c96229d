from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_sets import write_set

from medtl_dist.data.shards import open_dataset
from medtl_dist.data.stream import Batch, train_batches
from medtl_dist.data.transforms import MIXING, TrainTransform, augment_draws, draws_of
from medtl_dist.sections import Augment
from medtl_dist.train.mixing import mix, mixed

_BOTH = Augment(mixup_alpha=0.4, cutmix_alpha=1.0)


def _images(rows: int, value: int | None = None, size: int = 16) -> torch.Tensor:
    if value is not None:
        return torch.full((rows, 1, size, size), value, dtype=torch.uint8)
    return torch.randint(0, 256, (rows, 1, size, size), generator=torch.Generator().manual_seed(rows)).to(torch.uint8)


def _shares(label: int, rows: int) -> torch.Tensor:
    return F.one_hot(torch.full((rows,), label), 2).float()


def _draws(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, 8))


def test_mixup_is_the_blend_of_two_images_by_the_share_of_the_label() -> None:
    one, other = _images(20), _images(21)[:20]
    images, shares = mix(one, _shares(0, 20), other, _shares(1, 20), Augment(mixup_alpha=0.4), _draws(20))
    kept = shares[:, :1, None, None].double()
    expected = kept * one + (1 - kept) * other
    assert images.dtype == torch.uint8
    assert float((images - expected).abs().max()) <= 0.5  # rounding, nothing else
    torch.testing.assert_close(shares.sum(1), torch.ones(20))


def test_cutmix_pastes_one_box_and_the_labels_share_is_its_area() -> None:
    rows = 60
    images, shares = mix(
        _images(rows, 200),
        _shares(0, rows),
        _images(rows, 10),
        _shares(1, rows),
        Augment(cutmix_alpha=1.0),
        _draws(rows),
    )
    pasted = (images[:, 0] == 10).numpy()
    assert set(images.unique().tolist()) == {10, 200}
    np.testing.assert_allclose(shares[:, 1], pasted.mean(axis=(1, 2)), atol=2**-16)
    for image in pasted:  # a box: its rows times its columns
        assert image.sum() == image.any(axis=1).sum() * image.any(axis=0).sum()
    assert len({image.tobytes() for image in pasted}) > 40


@settings(deadline=None, max_examples=30)
@given(height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_labels_stay_shares_whatever_the_size(height: int, width: int, seed: int) -> None:
    one, other = torch.zeros(5, 3, height, width, dtype=torch.uint8), torch.ones(5, 3, height, width, dtype=torch.uint8)
    images, shares = mix(one, _shares(0, 5), other, _shares(1, 5), _BOTH, _draws(5, seed))
    assert images.shape == one.shape
    assert bool(((shares >= 0) & (shares <= 1)).all())
    torch.testing.assert_close(shares.sum(1), torch.ones(5))


def test_the_kept_share_is_beta_and_both_kinds_come_evenly() -> None:
    rows = 4000
    draws = _draws(rows)
    _, shares = mix(
        _images(rows, 0, 1), _shares(0, rows), _images(rows, 1, 1), _shares(1, rows), Augment(mixup_alpha=0.4), draws
    )
    kept = shares[:, 0].numpy()
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)); five standard errors.
    assert kept.mean() == pytest.approx(0.5, abs=5 * (0.139 / rows) ** 0.5)
    assert kept.var() == pytest.approx(1 / (4 * 1.8), abs=0.01)
    pure = mix(_images(rows, 0, 8), _shares(0, rows), _images(rows, 255, 8), _shares(1, rows), _BOTH, draws)[0]
    blended = ((pure > 0) & (pure < 255)).flatten(1).any(1).double().mean()
    assert 0.35 < float(blended) < 0.52  # mixup; some shares round to all or nothing


def test_the_images_given_are_left_alone() -> None:
    one, other = _images(6), _images(7)[:6]
    before = one.clone(), other.clone()
    mix(one, _shares(0, 6), other, _shares(1, 6), _BOTH, _draws(6))
    assert torch.equal(one, before[0])
    assert torch.equal(other, before[1])


def _stream(folder: Path, rank: int, world_size: int, start_step: int = 0) -> list[Batch]:
    dataset = open_dataset(folder) if folder.exists() else write_set(folder, {"train": [17, 30]})
    batches = train_batches(
        dataset,
        transform=TrainTransform(16),
        global_batch_size=10,
        seed=3,
        epoch=1,
        rank=rank,
        world_size=world_size,
        start_step=max(start_step - 1, 0),
        max_lanes=5,
    )
    return list(
        mixed(batches, _BOTH, num_classes=2, seed=3, epoch=1, start_step=start_step, device=torch.device("cpu"))
    )


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_mixed_batches_do_not_depend_on_the_world_size(tmp_path: Path, world_size: int) -> None:
    alone = _stream(tmp_path / "set", 0, 1)
    ranks = [_stream(tmp_path / "set", rank, world_size) for rank in range(world_size)]
    assert len(alone) == 4
    for step, batch in enumerate(alone):
        assert torch.equal(torch.cat([rank[step].images for rank in ranks]), batch.images)
        assert torch.equal(torch.cat([rank[step].labels for rank in ranks]), batch.labels)
        assert [key for rank in ranks for key in rank[step].keys] == batch.keys


@pytest.mark.parametrize("start_step", [1, 2, 3])
def test_a_resumed_epoch_is_mixed_as_the_whole_one(tmp_path: Path, start_step: int) -> None:
    whole, rest = _stream(tmp_path / "set", 0, 1)[start_step:], _stream(tmp_path / "set", 0, 1, start_step)
    assert len(rest) == len(whole) == 4 - start_step
    for one, other in zip(whole, rest, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_all_but_the_first_step_is_mixed(tmp_path: Path) -> None:
    stream = _stream(tmp_path / "set", 0, 1)
    assert bool((stream[0].labels.max(1).values == 1).all())
    later = torch.cat([batch.labels for batch in stream[1:]])
    assert bool(((later > 0) & (later < 1)).any())


def test_draws_of_mixing_are_none_of_the_views() -> None:
    assert not set(draws_of(1, 2, b"k" * 16, MIXING)) & set(augment_draws(1, 2, b"k" * 16))
