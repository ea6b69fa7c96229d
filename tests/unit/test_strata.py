"""Weighted sampling by class or domain, from a packed set to batches (data/strata.py and what reads by it)."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medtl_dist.data.loader import Loader
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import DATASET_FILE, Dataset, open_dataset, read_split
from medtl_dist.data.sources import Columns
from medtl_dist.data.strata import strata_of
from medtl_dist.data.stream import Batch, train_batches
from medtl_dist.data.transforms import TrainTransform
from medtl_dist.errors import DataError, UserError

NUMBER = 60  # images: every fifth is sick, of three hospitals in turn; some have none


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("weighted")
    rng = np.random.default_rng(0)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "site"])
        for number in range(NUMBER):
            Image.fromarray(rng.integers(0, 255, (24, 24), np.uint8)).save(folder / f"{number}.png")
            writer.writerow(
                [f"{number}.png", "sick" if number % 5 == 0 else "well", ["", "north", "south"][number % 3]]
            )
    options = PackOptions(columns=Columns(domain="site"), fractions=(1, 0, 0), image_size_px=24)
    return pack(folder / "table.csv", folder / "set", options)


def batches(dataset: Dataset, by: str, weights: dict[str, float] | None = None, **options: Any) -> list[Batch]:
    strata = strata_of(dataset, "train", by, weights)
    given = {"transform": TrainTransform(16), "global_batch_size": 6, "seed": 1, "epoch": 0, **options}
    return list(train_batches(dataset, strata=strata, **given))


def test_balanced_classes_are_seen_equally_often_and_the_rare_one_not_one_image_only(dataset: Dataset) -> None:
    seen = batches(dataset, "class")
    labels = Counter(label for batch in seen for label in batch.labels.tolist())
    assert labels == {0: 30, 1: 30}
    sick = dataset.classes.index("sick")
    keys = Counter(key for batch in seen for key in batch.keys)
    index = read_split(dataset, "train", ["key", "label"])
    for key, label in zip(index["key"].to_pylist(), index["label"].to_pylist(), strict=True):
        # 12 of the 60 are sick: each appears 2 or 3 times, and 30 of the 48 others once.
        assert keys[key.hex()] in ((2, 3) if label == sick else (0, 1))


def test_domains_have_the_weights_that_were_asked_for_and_images_without_one_their_own(dataset: Dataset) -> None:
    index = read_split(dataset, "train", ["key", "domain"])
    domain_of = {
        key.hex(): domain for key, domain in zip(*(index[name].to_pylist() for name in ("key", "domain")), strict=True)
    }
    totals = Counter()
    for epoch in range(3):
        seen = [
            domain_of[key]
            for batch in batches(dataset, "domain", {"north": 0.5, "": 2.0}, epoch=epoch)
            for key in batch.keys
        ]
        totals.update(seen)
        assert abs(seen.count("north") - 10) <= 5, "fewer than a batch is left out"
    assert totals[None] > 100
    assert totals["south"] > 50


def test_a_weighted_step_is_the_same_at_every_world_size_with_processes_and_after_a_resume(dataset: Dataset) -> None:
    whole = [batch.keys for batch in batches(dataset, "class")]
    by_rank = [batches(dataset, "class", rank=rank, world_size=3) for rank in range(3)]
    assert [[key for batch in step for key in batch.keys] for step in zip(*by_rank, strict=True)] == whole
    assert [batch.keys for batch in batches(dataset, "class", start_step=4)] == whole[4:]
    with Loader(2) as loader:
        assert [batch.keys for batch in batches(dataset, "class", loader=loader)] == whole
    assert [batch.keys for batch in batches(dataset, "class", epoch=1)] != whole


def test_the_pixels_and_labels_are_those_of_the_key(dataset: Dataset) -> None:
    plain = train_batches(dataset, transform=TrainTransform(16), global_batch_size=6, seed=1, epoch=0)
    known = {key: (batch.images[row], batch.labels[row]) for batch in plain for row, key in enumerate(batch.keys)}
    compared = 0
    for batch in batches(dataset, "class"):
        for row, key in enumerate(batch.keys):
            if key in known:  # augmentation is seeded by key and epoch alone
                assert batch.images[row].equal(known[key][0])
                assert batch.labels[row] == known[key][1]
                compared += 1
    assert compared > 40


def test_a_set_without_counts_per_shard_is_counted_from_its_index(dataset: Dataset) -> None:
    info = json.loads(json.dumps(dataset.info))
    for shard in info["splits"]["train"]["shards"]:
        del shard["classes"], shard["domains"]
    bare = Dataset(dataset.folder, info, dataset.sha256)
    for by in ("class", "domain"):
        ours, theirs = strata_of(bare, "train", by).weighting, strata_of(dataset, "train", by).weighting
        assert ours.counts.tolist() == theirs.counts.tolist()


def test_wrong_counts_are_damage(dataset: Dataset, tmp_path: Path) -> None:
    info = json.loads((Path(dataset.folder) / DATASET_FILE).read_text())
    info["splits"]["train"]["shards"][0]["classes"] = {"sick": 1}
    info["name"] = "x"
    with pytest.raises(DataError, match="do not add up"):
        strata_of(Dataset(dataset.folder, info, "0"), "train", "class")
    first = info["splits"]["train"]["shards"][0]
    first["classes"] = {"sick": first["samples"]}
    with pytest.raises(DataError, match=r"index of .*train-000000.tar: its classes or domains differ"):
        list(
            train_batches(
                Dataset(dataset.folder, info, "0"),
                transform=TrainTransform(16),
                global_batch_size=6,
                seed=1,
                epoch=0,
                strata=strata_of(Dataset(dataset.folder, info, "0"), "train", "class"),
            )
        )


def test_a_name_that_the_set_lacks_is_refused_with_those_it_has(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"names east, which split 'train' of .* lacks; it has: , north, south"):
        strata_of(dataset, "train", "domain", {"east": 2.0})
    with pytest.raises(UserError, match="it has: sick, well"):
        strata_of(dataset, "train", "class", {"ill": 2.0})


def test_a_set_without_domains_is_told_to_use_classes(tmp_path: Path) -> None:
    for number in range(16):
        place = tmp_path / "tree" / ("a" if number % 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 7 * number, np.uint8)).save(place / f"{number}.png")
    packed = pack(tmp_path / "tree", tmp_path / "set", PackOptions(fractions=(1, 0, 0)))
    with pytest.raises(UserError, match="has no domains; use class"):
        strata_of(open_dataset(packed.folder), "train", "domain")
