"""Files of the prefix cache, its rows without pixels, its plan, and what a warm process keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_sets import write_set
from tiny_backbone import tiny_registered

from medtl_dist.config import Config, load_config
from medtl_dist.data.entries import eval_entries, train_entries
from medtl_dist.data.reader import EvalPass, TrainPass
from medtl_dist.data.shards import Dataset
from medtl_dist.data.strata import strata_of
from medtl_dist.data.stream import eval_batches, rows_batches, run_length_of, train_batches
from medtl_dist.data.transforms import EvalTransform, TrainTransform, augment_draws, view_of
from medtl_dist.errors import DataError
from medtl_dist.train.prefix_plan import Estimate, estimate, plan_groups
from medtl_dist.train.prefix_store import Entry, Shape, Store, remove_store
from medtl_dist.train.setup import create_network, open_shards
from medtl_dist.train.warm import Warm

_SHAPE = Shape(num_rows=10, row_bytes=6, chunk_rows=4)
_ROWS = np.arange(60, dtype=np.uint8).reshape(10, 6)
_EVAL = EvalTransform(16)


def _opened(store: Store, name: str = "a", shape: Shape = _SHAPE) -> Entry:
    entry = store.open(name, shape, {"depth": 2})
    assert entry is not None
    return entry


def _filled(entry: Entry) -> list[tuple[int, int]]:
    """Fills the entry and tells which rows were computed."""
    computed: list[tuple[int, int]] = []

    def compute(start: int, stop: int) -> np.ndarray:
        computed.append((start, stop))
        return _ROWS[start:stop]

    while entry.fill_one(compute) != "complete":
        pass
    return computed


# --- views


@settings(deadline=None, max_examples=50)
@given(key=st.binary(min_size=16, max_size=16), epoch=st.integers(0, 10**6), views=st.integers(1, 50))
def test_an_image_shows_each_view_once_in_as_many_epochs_and_then_again(key: bytes, epoch: int, views: int) -> None:
    seen = [view_of(key, epoch + later, views) for later in range(views)]
    assert sorted(seen) == list(range(views))
    assert view_of(key, epoch + views, views) == seen[0]


@settings(deadline=None, max_examples=20)
@given(views=st.integers(2, 8), epoch=st.integers(0, 100), seed=st.integers(0, 2**32))
def test_every_view_is_shown_by_about_as_many_images(views: int, epoch: int, seed: int) -> None:
    keys = np.random.default_rng(seed).bytes(16 * 4000)
    counts = np.bincount([view_of(keys[i : i + 16], epoch, views) for i in range(0, len(keys), 16)], minlength=views)
    # Binomial: six standard deviations.
    assert np.abs(counts - 4000 / views).max() < 6 * np.sqrt(4000 / views * (1 - 1 / views))


def test_numbered_views_are_seeded_by_their_number_and_fresh_ones_by_the_epoch(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, {"train": [7, 5]})
    view = TrainTransform(16, rotation_deg=5.0)
    options = {"transform": view, "global_batch_size": 12, "seed": 3}
    key, image = bytes(range(16)), np.arange(300, dtype=np.uint8).reshape(20, 15, 1)
    for epoch in range(4):
        fixed = {"rank": 0, "world_size": 1, "start_step": 0, "max_lanes": 4, "run_length": 3, "verify": True}
        for views, number in ((3, view_of(key, epoch, 3)), (None, epoch)):
            work = TrainPass(dataset, "train", epoch=epoch, views=views, **options, **fixed)  # type: ignore[arg-type]
            expected = work.transform(image, augment_draws(3, number, key))
            assert np.array_equal(work.view(image, key), expected)
    shown = [_by_key(train_batches(dataset, epoch=epoch, views=2, **options)) for epoch in (0, 2, 1)]  # type: ignore[arg-type]
    assert all(np.array_equal(shown[0][key], shown[1][key]) for key in shown[0])
    assert not any(np.array_equal(shown[0][key], shown[2][key]) for key in shown[0])
    # The rows of an epoch, in index order, are what that epoch shows.
    rows = _by_key(rows_batches(dataset, "train", transform=view, batch_size=4, start=0, stop=12, shown=(3, 1, 2)))
    assert all(np.array_equal(rows[key], shown[2][key]) for key in rows)
    assert len(rows) == 12


def _by_key(batches) -> dict[str, np.ndarray]:
    return {key: image.numpy() for batch in batches for key, image in zip(batch.keys, batch.images, strict=False)}


# --- rows without pixels


@pytest.mark.parametrize(("world_size", "start_step", "weighted"), [(1, 0, False), (2, 1, False), (3, 0, True)])
def test_entries_are_the_rows_of_the_batches_and_need_no_shard(
    tmp_path: Path, world_size: int, start_step: int, weighted: bool
) -> None:
    dataset = write_set(tmp_path, {"train": [11, 9, 6], "val": [5, 4]})
    if weighted:
        for shard in dataset.info["splits"]["train"]["shards"]:
            count = shard["samples"]
            shard["domains"] = {"a": count // 2, "": count - count // 2}
    strata = None
    if weighted:
        strata = _strata(dataset)
    length = run_length_of(dataset, "train", 6, strata=strata)
    batches, entries = [], []
    for rank in range(world_size):
        options = {"transform": TrainTransform(16), "global_batch_size": 6, "seed": 1, "epoch": 2, "rank": rank}
        options |= {"world_size": world_size, "start_step": start_step, "strata": strata}
        batches.append(list(train_batches(dataset, **options)))
        work = TrainPass(dataset, "train", max_lanes=64, run_length=length, verify=True, **options)
        entries.append(train_entries(work))
    evaluated = list(eval_batches(dataset, "val", transform=_EVAL, batch_size=4))
    keys = [
        key
        for batch in rows_batches(dataset, "train", transform=_EVAL, batch_size=4, start=0, stop=26)
        for key in batch.keys
    ]
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    for of_rank, found in zip(batches, entries, strict=True):
        listed = list(found)
        assert len(listed) == len(of_rank) > 0
        for batch, entry in zip(of_rank, listed, strict=True):
            assert entry.hex_keys() == batch.keys == [keys[row] for row in entry.rows]
            assert entry.labels.tolist() == batch.labels.tolist()
    found = list(eval_entries(EvalPass(dataset, "val", _EVAL, 4, 0, 1, verify=True)))
    assert [entry.hex_keys() for entry in found] == [batch.keys for batch in evaluated]
    assert [entry.rows.tolist() for entry in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    with pytest.raises(DataError):
        list(eval_batches(dataset, "val", transform=_EVAL, batch_size=4))


def _strata(dataset: Dataset):
    classes = dataset.classes
    first = 0
    for shard in dataset.info["splits"]["train"]["shards"]:
        labels = [(first + i) % 2 for i in range(shard["samples"])]
        shard["classes"] = {name: labels.count(number) for number, name in enumerate(classes)}
        first += shard["samples"]
    dataset.info["splits"]["train"]["classes"] = dict.fromkeys(classes, 13)
    return strata_of(dataset, "train", "class", {classes[0]: 1.5})


# --- files


def test_what_was_filled_is_found_again_and_nothing_is_computed_twice(tmp_path: Path) -> None:
    store = Store(tmp_path, 1000)
    entry = _opened(store)
    assert not store.is_complete("a")
    assert store.about("a") is None
    assert _filled(entry) == [(0, 4), (4, 8), (8, 10)]
    assert store.is_complete("a")
    assert store.about("a") == {"depth": 2}
    for found in (entry, _opened(Store(tmp_path, 1000))):
        assert _filled(found) == []
        rows = found.rows()
        assert rows is not None
        assert np.array_equal(rows, _ROWS)
        assert not rows.flags.writeable
    remove_store(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_chunk_is_noticed_and_computed_again_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, 1000)
    _filled(_opened(store))
    data = tmp_path / "medtl-prefix" / "a" / "data.bin"
    raw = bytearray(data.read_bytes())
    raw[4 * 6 + 5] ^= 1
    data.write_bytes(raw)
    entry = _opened(store)
    assert entry.rows() is None
    assert not store.is_complete("a")
    assert _filled(entry) == [(4, 8)]
    rows = entry.rows()
    assert rows is not None
    assert np.array_equal(rows, _ROWS)


def test_a_chunk_that_was_never_marked_is_computed_whatever_lies_there(tmp_path: Path) -> None:
    store = Store(tmp_path, 1000)
    entry = _opened(store)
    assert entry.fill_one(lambda start, stop: _ROWS[start:stop], turn=1) == "filled"
    again = _opened(store)
    assert _filled(again) == [(0, 4), (8, 10)]
    assert again.rows() is not None


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"sha256": [1, 2]}', b'{"sha256": "abc"}'])
def test_a_damaged_manifest_is_no_reason_to_believe_anything(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path, 1000)
    _filled(_opened(store))
    (tmp_path / "medtl-prefix" / "a" / "manifest.json").write_bytes(content)
    entry = _opened(store)
    assert entry.rows() is None
    assert _filled(entry) == []  # the marks still vouch for the chunks
    assert entry.rows() is not None


def test_the_least_recently_used_that_nobody_holds_makes_room(tmp_path: Path) -> None:
    store = Store(tmp_path, 3 * _SHAPE.num_bytes)
    entries = {name: _opened(store, name) for name in "abc"}
    assert store.open("d", _SHAPE) is None  # all three are held
    for name, used in (("a", 30), ("b", 10), ("c", 20)):
        os.utime(tmp_path / "medtl-prefix" / name / "in_use", (used, used))
    entries["a"].close()
    entries["c"].close()
    assert store.open("too-large", Shape(100, 6, 4)) is None
    _opened(store, "d")  # b was used longest ago but is held
    assert sorted(path.name for path in store._entries()) == ["a", "b", "d"]
    assert store.used() <= store.limit


_WORKER = """
import os, sys
import numpy as np
from medtl_dist.train.prefix_store import Shape, Store
rows = np.arange(600, dtype=np.uint8).reshape(100, 6)
log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
first = True
def compute(start, stop):
    global first
    if first:
        os.write(1, b"holding\\n")
        sys.stdin.readline()
    first = False
    os.write(log, f"{start}\\n".encode())
    return rows[start:stop]
entry = Store(sys.argv[1], 10**6).open("a", Shape(100, 6, 4))
while entry.fill_one(compute) != "complete":
    pass
print(bool((entry.rows() == rows).all()))
"""


def _worker(folder: Path, log: Path) -> subprocess.Popen[str]:
    """A process that fills the entry; it is in the midst of its first chunk, and goes on when a line comes."""
    worker = subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(folder), str(log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "holding\n"
    return worker


def test_two_processes_at_once_compute_every_chunk_once(tmp_path: Path) -> None:
    workers = [_worker(tmp_path, tmp_path / "log") for _ in range(2)]  # at a chunk each, at the same time
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    assert [worker.communicate(timeout=60)[0] for worker in workers] == ["True\n", "True\n"]
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(0, 100, 4))


def test_what_a_killed_process_was_at_is_computed_by_another(tmp_path: Path) -> None:
    dying = _worker(tmp_path, tmp_path / "log")
    store = Store(tmp_path, 10**6)
    shape = Shape(100, 6, 4)
    entry = _opened(store, shape=shape)
    done = [entry.fill_one(lambda start, stop: np.zeros((stop - start, 6), np.uint8)) for _ in range(25)]
    assert done == [*["filled"] * 24, "waiting"]
    dying.send_signal(signal.SIGKILL)
    dying.communicate(timeout=60)
    assert entry.fill_one(lambda start, stop: np.zeros((stop - start, 6), np.uint8)) == "filled"
    assert entry.fill_one(lambda start, stop: np.zeros((stop - start, 6), np.uint8)) == "complete"


# --- plan


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plan") / "set"
    write_set(folder, {"train": [11, 9, 6], "val": [9, 5]})
    return str(folder)


def _config(shards: str, *overrides: str) -> Config:
    fixed = ("model.backbone=tiny", "train.threads=1", "augment.views=3", "train.epochs=4")
    return load_config(preset="smoke", overrides=[f"data.shards={shards}", *fixed, *overrides])


def test_trials_are_grouped_by_what_they_can_share(shards: str) -> None:
    given = [
        ("model.frozen_depth=2",),
        ("model.frozen_depth=2", "optim.lr=0.5", "train.epochs=2"),
        ("model.frozen_depth=all",),
        ("model.frozen_depth=2", "train.seed=1"),  # other random weights
        ("model.frozen_depth=2", "augment.rotation_deg=9"),
        ("model.frozen_depth=2", "augment.mixup_alpha=0.2"),
        ("model.frozen_depth=5", "train.unfreeze={2: 2}"),
    ]
    with tiny_registered():
        configs = [_config(shards, *overrides) for overrides in given]
        groups = plan_groups(configs, open_shards(configs[0]))
    assert [group.trials for group in groups] == [(0, 1, 6), (2,), (3,), (4,), (5,)]
    assert [group.depth for group in groups] == [2, 5, 2, 2, 0]
    # Depth 2 of 32 px: 8 channels of 8 by 8 (two strides of 2), float32; three views and val.
    assert groups[0].bytes == (3 * 26 + 14) * 8 * 8 * 8 * 4
    assert groups[1].bytes == (3 * 26 + 14) * 8 * 4
    assert [group.reason is None for group in groups] == [True, True, True, True, False]
    assert "mixup" in (groups[4].reason or "")


def test_an_estimate_knows_the_autocast_type(shards: str) -> None:
    with tiny_registered():
        config = _config(shards, "model.frozen_depth=4", "train.precision=bf16", "train.epochs=1")
        found = estimate(config, open_shards(config))
    assert isinstance(found, Estimate)
    assert (found.shape, found.dtype) == ((8, 4, 4), torch.bfloat16)
    assert found.num_bytes == (26 + 14) * 8 * 4 * 4 * 2


# --- warm


def test_a_kept_network_is_a_copy_with_the_same_bits(shards: str) -> None:
    with tiny_registered():
        config, warm = _config(shards), Warm()
        dataset = warm.dataset(config, open_shards)
        assert warm.dataset(config, open_shards) is dataset
        device = torch.device("cpu")
        made = [create_network(config, dataset, device=device, rank=0, keep=warm.network).model for _ in range(2)]
        made.append(create_network(config, dataset, device=device, rank=0).model)
        for name, tensor in made[0].state_dict().items():
            assert all(torch.equal(other.state_dict()[name], tensor) for other in made[1:])
        with torch.no_grad():
            made[0].get_parameter("fc.weight").zero_()
        assert made[1].get_parameter("fc.weight").abs().sum() > 0
        other = create_network(
            _config(shards, "train.seed=5"), dataset, device=device, rank=0, keep=warm.network
        ).model.get_parameter("fc.weight")
        assert not torch.equal(other, made[1].get_parameter("fc.weight"))


def test_a_set_that_was_packed_again_is_opened_again(tmp_path: Path) -> None:
    write_set(tmp_path / "set", {"train": [11], "val": [9]})
    config, warm = _config(str(tmp_path / "set")), Warm()
    before = warm.dataset(config, open_shards)
    info = json.loads((tmp_path / "set" / "dataset.json").read_text())
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(info | {"group_source": "none"}))
    assert warm.dataset(config, open_shards).sha256 != before.sha256
