"""Tars as plain webdataset writes them, what it reads of tars, and refusals to adopt."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
from shard_sets import image_of
from webdataset.compat import WebDataset
from webdataset.writer import ShardWriter

from medtl_dist.data.adopt import AdoptOptions, adopt
from medtl_dist.data.shards import Dataset
from medtl_dist.data.stream import Batch, eval_batches
from medtl_dist.data.transforms import EvalTransform
from medtl_dist.errors import DataError, MedtlError

SHOW = EvalTransform(24, mode="squash")
ONE: dict[str, Any] = {"num_workers": 1}


def write_shards(folder: Path, split: str, samples: list[dict[str, Any]], per_shard: int = 5) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(str(folder / f"{split}-%03d.tar"), maxcount=per_shard, verbose=0) as writer:
        for item in samples:
            writer.write(item)


def facts(split: str, number: int) -> dict[str, Any]:
    return {"finding": "ab"[number % 2], "patient": f"Doe-{split}-{number // 3}", "site": "NS"[number // 4 % 2],
            "age": 20 + number, "weight": 1.5 if number % 3 else None}  # fmt: skip


def item(split: str, number: int, **changes: Any) -> dict[str, Any]:
    made = {
        "__key__": f"study/Doe{number:03d}",
        "png": image_of(number)[:, :, 0],
        "json": facts(split, number),
        "cls": number % 2,
    }
    return {name: value for name, value in {**made, **changes}.items() if value is not None}


def write_foreign(folder: Path) -> Path:
    """17 samples in train and 6 in val, in tars of five."""
    for split, count in (("train", 17), ("val", 6)):
        write_shards(folder, split, [item(split, number) for number in range(count)])
    return folder


def by_webdataset(paths: list[str], *decode: str) -> list[dict[str, Any]]:
    """What plain webdataset makes of the tars; it leaves their closing to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        stream: Any = WebDataset(paths, shardshuffle=False)
        found = list(stream.decode(*decode) if decode else stream)
        del stream
        gc.collect()
    return found


def batches(dataset: Dataset, split: str) -> list[Batch]:
    return list(eval_batches(dataset, split, transform=SHOW, batch_size=4))


def refused(folder: Path, kind: type[MedtlError] = DataError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        adopt(folder, AdoptOptions(**{**ONE, **options}))
    assert "\n" not in caught.value.message
    assert "Doe" not in caught.value.message
    assert not (folder / "dataset.json").exists()
    return caught.value.message
