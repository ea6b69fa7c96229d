"""Batches out of shards (data/stream.py, loader.py, worker.py, reader.py)."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from shard_sets import Negative, image_of, key_of, write_info, write_set

from medtl_dist.data.loader import Loader
from medtl_dist.data.plan import run_length_for, train_plan
from medtl_dist.data.reader import EvalPass
from medtl_dist.data.shards import Dataset, open_dataset
from medtl_dist.data.stream import Batch, eval_batches, run_length_of, train_batches
from medtl_dist.data.transforms import EvalTransform, TrainTransform, augment_draws
from medtl_dist.errors import DataError, Interrupted, UserError

TRAIN = TrainTransform(16, crop_area_min=0.5, brightness=0.2)
SHOW = EvalTransform(16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_set(tmp_path_factory.mktemp("set"), {"train": [30, 1, 22], "val": [9, 8], "test": [3]})


@pytest.fixture(scope="module")
def loader():
    with Loader(2) as processes:
        yield processes


def epoch_of(dataset: Dataset, batch: int = 12, **options: Any) -> list[Batch]:
    return list(train_batches(dataset, transform=TRAIN, global_batch_size=batch, **{"seed": 5, "epoch": 0, **options}))


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert [batch.keys for batch in one] == [batch.keys for batch in other]
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


# --- training ---


def test_batches_hold_the_planned_samples_with_their_labels_and_pixels(dataset: Dataset) -> None:
    run = run_length_of(dataset, "train", 12)
    plan = train_plan([30, 1, 22], global_batch_size=12, seed=5, epoch=0, run_length=run)
    first = [0, 30, 31]
    batches = epoch_of(dataset)
    assert len(batches) == plan.num_steps == 4
    for step, batch in enumerate(batches):
        numbers = [first[shard] + row for shard, row in plan.step(step)]
        assert batch.keys == [key_of("train", number) for number in numbers]
        assert batch.labels.tolist() == [number % 2 for number in numbers]
        assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)
        assert batch.images.shape == (12, 1, 16, 16)
        for image, number in zip(batch.images, numbers, strict=True):
            draws = augment_draws(5, 0, bytes.fromhex(key_of("train", number)))
            assert np.array_equal(image.numpy(), TRAIN(image_of(number), draws))


@pytest.mark.parametrize("world_size", [2, 5, 12])
def test_ranks_joined_are_the_batches_of_one_rank_with_and_without_processes(
    dataset: Dataset, loader: Loader, world_size: int
) -> None:
    whole = epoch_of(dataset)
    ranks = [
        epoch_of(dataset, rank=rank, world_size=world_size, loader=loader if rank % 2 else None)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        assert [item for rank in ranks for item in rank[step].keys] == batch.keys
        assert torch.equal(torch.cat([rank[step].images for rank in ranks]), batch.images)


@pytest.mark.parametrize(("num_workers", "batch", "started"), [(1, 12, 1), (3, 12, 3), (9, 2, 2)])
def test_loader_processes_change_nothing(dataset: Dataset, num_workers: int, batch: int, started: int) -> None:
    """Not even more of them than lanes: those are not started."""
    with Loader(num_workers) as processes:
        assert_same(epoch_of(dataset, batch, loader=processes), epoch_of(dataset, batch))
        assert len(processes.process_ids) == started


@pytest.mark.parametrize("in_processes", [False, True])
def test_starting_at_a_step_continues_the_epoch(dataset: Dataset, loader: Loader, in_processes: bool) -> None:
    options: dict[str, Any] = {"loader": loader} if in_processes else {}
    whole = epoch_of(dataset)
    for start in (1, 3, 4):
        assert_same(epoch_of(dataset, start_step=start, **options), whole[start:])
    with pytest.raises(ValueError, match="start_step 5 of 4"):
        epoch_of(dataset, start_step=5, **options)


def test_epochs_differ_and_the_augmentation_follows_the_epoch(dataset: Dataset, loader: Loader) -> None:
    epochs = [epoch_of(dataset, epoch=epoch, loader=loader) for epoch in range(2)]
    assert epochs[0][0].keys != epochs[1][0].keys
    pixels = [
        {key: image for batch in epoch for key, image in zip(batch.keys, batch.images, strict=True)} for epoch in epochs
    ]
    both = set(pixels[0]) & set(pixels[1])
    assert both
    assert not any(torch.equal(pixels[0][key], pixels[1][key]) for key in both)


@pytest.mark.parametrize(
    ("samples", "mean_bytes", "expected"), [(10**6, 10**4, 128), (10**6, 10**6, 2), (300, 2000, 9)]
)
def test_runs_are_short_where_images_are_large_or_few(samples: int, mean_bytes: int, expected: int) -> None:
    shard = {"name": "train-000000.tar", "samples": samples, "bytes": samples * mean_bytes, "sha256": ""}
    dataset = Dataset("nowhere", {"splits": {"train": {"shards": [shard]}}}, "")
    assert run_length_of(dataset, "train", 4) == expected == run_length_for(samples, mean_bytes, 4)


def test_too_few_samples_and_too_many_ranks_are_told_at_the_call(dataset: Dataset) -> None:
    options: dict[str, Any] = {"transform": TRAIN, "seed": 0, "epoch": 0}
    with pytest.raises(UserError, match=r"53 training samples .*global_batch_size = 54"):
        train_batches(dataset, global_batch_size=54, **options)
    with pytest.raises(UserError, match="4 workers are more than the 3 lanes"):
        train_batches(dataset, global_batch_size=3, rank=0, world_size=4, **options)
    with pytest.raises(UserError, match="has no split 'none'"):
        train_batches(dataset, "none", global_batch_size=3, **options)


# --- evaluation ---


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("in_processes", [False, True])
def test_evaluation_sees_every_sample_once_in_batches_of_one_shape(
    dataset: Dataset, loader: Loader, world_size: int, in_processes: bool
) -> None:
    seen: list[Batch] = []
    for rank in range(world_size):
        seen += eval_batches(
            dataset,
            "val",
            transform=SHOW,
            batch_size=5,
            rank=rank,
            world_size=world_size,
            loader=loader if in_processes else None,
        )
    assert [batch.num_real for batch in seen] == [5, 5, 5, 2]
    assert [item for batch in seen for item in batch.keys] == [key_of("val", number) for number in range(17)]
    assert torch.cat([batch.labels for batch in seen]).tolist() == [number % 2 for number in range(17)]
    assert {tuple(batch.images.shape) for batch in seen} == {(5, 1, 16, 16)}
    assert not seen[-1].images[2:].any(), "padding is black, not what the slot held before"
    for number, image in enumerate(torch.cat([batch.images[: batch.num_real] for batch in seen])):
        assert np.array_equal(image.numpy(), SHOW(image_of(number)))


def test_more_ranks_than_batches_leave_some_with_none(dataset: Dataset, loader: Loader) -> None:
    for here in (None, loader):
        counts = [
            len(list(eval_batches(dataset, "test", transform=SHOW, batch_size=8, rank=r, world_size=3, loader=here)))
            for r in range(3)
        ]
        assert sorted(counts) == [0, 0, 1]


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, {"train": [4], "val": [0]})
    with pytest.raises(UserError, match=r"split 'val' .* is empty"):
        eval_batches(dataset, "val", transform=SHOW, batch_size=4)
    with pytest.raises(UserError, match="no split 'test'"):
        eval_batches(dataset, "test", transform=SHOW, batch_size=4)


def test_loader_processes_import_from_wherever_their_parent_does(dataset: Dataset, loader: Loader) -> None:
    """``shard_sets`` is on no path but the test run's own ``sys.path``."""
    (batch,) = eval_batches(dataset, "test", transform=Negative(16), batch_size=3, loader=loader)
    assert np.array_equal(batch.images[2].numpy(), 255 - SHOW(image_of(2)))


def test_colour_images_come_as_rgb(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, {"val": [3]}, channels=3)
    (batch,) = eval_batches(dataset, "val", transform=SHOW, batch_size=3)
    assert batch.images.shape == (3, 3, 16, 16)
    assert np.array_equal(batch.images[1].numpy(), SHOW(image_of(1, channels=3)))


# --- damage ---


def damage(dataset: Dataset, how: str) -> None:
    shard = Path(dataset.folder) / dataset.shards("train")[0].name
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        os.truncate(shard, 2000)
    else:
        raw = bytearray(shard.read_bytes())
        raw[raw.index(b"IDAT") + 20] ^= 1
        shard.write_bytes(raw)


@pytest.mark.parametrize("in_processes", [False, True])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", r"train-000000\.tar \(No such file"),
        ("truncated", r"train-000000\.tar is damaged: it ends at byte 2000"),
        ("flipped", rf"train-000000\.tar: image {key_of('train', 0)} is damaged: its bytes differ"),
    ],
)
def test_damage_is_a_data_error_that_names_the_shard_also_from_a_process(
    tmp_path: Path, how: str, says: str, in_processes: bool
) -> None:
    dataset = write_set(tmp_path, {"train": [6]})
    damage(dataset, how)
    with Loader(2 if in_processes else 0) as loader, pytest.raises(DataError, match=says) as caught:
        epoch_of(dataset, batch=6, loader=loader)
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.message


def test_without_verification_a_flipped_byte_is_found_by_the_decoder_or_not_at_all(tmp_path: Path) -> None:
    """The reason for checksums (TRAPS): PNG has its own, so here the decoder notices; JPEG has none."""
    dataset = write_set(tmp_path, {"train": [6]}, encoding=".jpg")
    shard = Path(dataset.folder) / "train-000000.tar"
    raw = bytearray(shard.read_bytes())
    raw[raw.index(b"\xff\xda") + 30] ^= 1
    shard.write_bytes(raw)
    assert len(epoch_of(dataset, batch=6, verify=False)) == 1
    with pytest.raises(DataError, match="differ from the checksum"):
        epoch_of(dataset, batch=6)


def test_an_index_that_points_outside_its_shard_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, {"train": [6]})
    info = json.loads((tmp_path / "dataset.json").read_text())
    longer = tmp_path / "train-000000.tar"
    os.truncate(longer, 3000)
    info["splits"]["train"]["shards"][0]["bytes"] = 3000
    write_info(tmp_path, info["splits"], 1)
    with pytest.raises(DataError, match="points beyond its end"):
        epoch_of(open_dataset(tmp_path), batch=6)


@pytest.mark.parametrize(
    ("column", "row", "value"), [("size", 2, 0), ("offset", 3, 512), ("offset", 0, -1), ("label", 1, None)]
)
def test_a_damaged_index_is_refused(tmp_path: Path, column: str, row: int, value: int | None) -> None:
    write_set(tmp_path, {"train": [6]})
    index = pq.read_table(tmp_path / "index.parquet")
    values = index.column(column).to_pylist()
    values[row] = value
    place = index.column_names.index(column)
    pq.write_table(index.set_column(place, index.schema.field(place), [values]), tmp_path / "index.parquet")
    write_info(tmp_path, json.loads((tmp_path / "dataset.json").read_text())["splits"], 1)
    with pytest.raises(DataError, match=r"index .*is damaged"):
        epoch_of(open_dataset(tmp_path), batch=6)


def test_a_bug_in_a_process_shows_its_traceback(dataset: Dataset) -> None:
    work = EvalPass(dataset, "val", SHOW, 4, 0, 1, verify=True, max_pixels="many")  # type: ignore[arg-type]
    with Loader(1) as loader, pytest.raises(RuntimeError, match=r"loader process failed:\n(.|\n)*TypeError"):
        list(loader.run(work))


# --- processes ---


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    # An orphan that ended may still wait to be collected by whatever process 1 is here.
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_killed_loader_process_is_told_at_once_and_the_loader_works_again(dataset: Dataset) -> None:
    with Loader(2) as loader:
        batches = train_batches(dataset, transform=TRAIN, global_batch_size=2, seed=0, epoch=0, loader=loader)
        next(batches)
        victims = loader.process_ids
        os.kill(victims[1], signal.SIGKILL)
        with pytest.raises(Interrupted, match=rf"loader process {victims[1]} was killed by signal 9"):
            list(batches)
        assert not any(map(is_alive, victims))
        assert_same(epoch_of(dataset, loader=loader), epoch_of(dataset))


def test_an_interrupt_from_the_terminal_is_left_to_the_parent(dataset: Dataset, loader: Loader) -> None:
    """Ctrl-C reaches the whole group of processes; the loader's must not die before the parent has saved its state."""
    options: dict[str, Any] = {"transform": TRAIN, "global_batch_size": 2, "seed": 0, "epoch": 0, "loader": loader}
    batches = train_batches(dataset, **options)
    first = next(batches)
    for process_id in loader.process_ids:
        os.kill(process_id, signal.SIGINT)
    assert_same([first, *batches], epoch_of(dataset, 2, seed=0))


def test_processes_last_over_passes_and_end_with_the_loader(dataset: Dataset) -> None:
    gc.collect()  # what earlier tests dropped is not this loader's
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with Loader(2) as loader:
        epoch_of(dataset, loader=loader)
        first = loader.process_ids
        list(eval_batches(dataset, "val", transform=SHOW, batch_size=64, loader=loader))
        epoch_of(dataset, epoch=1, loader=loader)
        assert loader.process_ids == first
        assert len(first) == 2
    assert loader.process_ids == []
    assert not any(map(is_alive, first))
    gc.collect()
    assert descriptors is None or len(os.listdir("/proc/self/fd")) <= descriptors


def test_an_abandoned_pass_does_not_disturb_the_next(dataset: Dataset, loader: Loader) -> None:
    for taken in (0, 1, 3):
        abandoned = train_batches(dataset, transform=TRAIN, global_batch_size=4, seed=9, epoch=0, loader=loader)
        for _ in range(taken):
            next(abandoned)
        assert_same(epoch_of(dataset, loader=loader), epoch_of(dataset))
        if taken:
            with pytest.raises(RuntimeError, match="ended when another began"):
                next(abandoned)


def test_a_loader_that_is_dropped_unclosed_takes_its_processes_along(dataset: Dataset) -> None:
    loader = Loader(1)
    next(train_batches(dataset, transform=TRAIN, global_batch_size=4, seed=0, epoch=0, loader=loader))
    ids = loader.process_ids
    del loader
    gc.collect()
    assert not any(map(is_alive, ids))


def test_loader_processes_end_when_their_parent_is_killed(dataset: Dataset, tmp_path: Path) -> None:
    work = EvalPass(dataset, "val", SHOW, 4, 0, 1, verify=True)
    code = f"""
import os, pickle, signal
from medtl_dist.data.loader import Loader
loader = Loader(2)
batches = loader.run(pickle.loads({pickle.dumps(work)!r}))
next(batches)
print(*loader.process_ids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # Standard output is inherited by the loader processes, so reading it to the end waits for them too.
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    ids = [int(word) for word in done.stdout.split()]
    assert len(ids) == 2
    assert not any(map(is_alive, ids))


def test_a_loader_works_in_a_thread_and_in_another_folder(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a Ray Train worker: the loop runs in a thread, the working directory is not the project's."""
    monkeypatch.chdir(tmp_path)
    found: list[Batch] = []

    def loop() -> None:
        with Loader(1) as loader:
            found.extend(epoch_of(dataset, loader=loader))

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert_same(found, epoch_of(dataset))


def test_loader_processes_need_no_torch_and_reading_no_pandas(dataset: Dataset) -> None:
    """What a loader process imports and does at its start: each of these costs a second, or tens of MiB, per process."""
    code = (
        "import sys; from medtl_dist.data import pieces, plan, shards, worker;"
        "pieces.Reader(shards.open_dataset(sys.argv[1]), 'train').read(plan.Piece(0, 0, 2));"
        "print({'torch', 'webdataset', 'ray', 'pandas', 'scipy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, dataset.folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(UserError, match="loader_workers = -1"):
        Loader(-1)


def test_what_the_index_says_is_what_the_tar_holds(dataset: Dataset) -> None:
    """The fixture itself: keys are as long as real ones."""
    assert len(bytes.fromhex(key_of("train", 0))) == 16
    assert hashlib.sha256(Path(dataset.folder, "dataset.json").read_bytes()).hexdigest() == dataset.sha256
