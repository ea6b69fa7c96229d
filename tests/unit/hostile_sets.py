"""Samples of a set of our making, and what the training reader says of a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shard_sets import key_of
from tar_files import (
    member,
    png,
)

from medtl_dist.data.shards import Dataset
from medtl_dist.data.stream import eval_batches, train_batches
from medtl_dist.data.transforms import EvalTransform, TrainTransform
from medtl_dist.errors import DataError

SHOW = EvalTransform(24, mode="squash")
KEYS = [key_of("val", number) for number in range(4)]


def ours(number: int, image: bytes | None = None) -> bytes:
    """The members of a sample of our making, numbered so that label = number % 2."""
    text = json.dumps({"class": str(number % 2), "label": number % 2}).encode()
    return member(f"{KEYS[number]}.png", image or png(number)) + member(f"{KEYS[number]}.json", text)


def refusal_by_reader(dataset: Dataset) -> str:
    """Both readers refuse the set, with one message."""
    said = set()
    for batches in (
        lambda: eval_batches(dataset, "val", transform=SHOW, batch_size=3),
        lambda: train_batches(dataset, "val", transform=TrainTransform(24), global_batch_size=1, seed=0, epoch=0),
    ):
        with pytest.raises(DataError) as caught:
            list(batches())
        said.add(caught.value.message.partition("image")[0])
    return caught.value.message


def nothing_ran(tmp_path: Path) -> bool:
    return not list(tmp_path.rglob("canary*")) and not Path("/tmp/canary.png").exists()
