"""Packing, start-up, memory and reads of the data plane, beside what bounds them.

    python benchmarks/data_plane.py kermany_cxr_224/labels.csv

packing    images per second and core, how many epochs of decoding the originals pay for it, and peak memory while the number
           of images grows tenfold
start-up   opening a set of 10^5 shards, and the first batch of an epoch, at its beginning and in its middle
memory     of the reading process and its loader over ten epochs
reads      of the shards per run of samples, in one epoch

Every figure is of a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

BATCH = 64


def peak_mib() -> float:
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**10


def resident_mib(pid: int | str = "self") -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def pack_table(table: str, out: str, images: str) -> dict[str, float]:
    """Pack so many of the table's images."""
    from medtl_dist.data.pack import PackOptions, pack
    from medtl_dist.data.sources import Columns

    rows = csv.read_csv(table).select(["file", "label"])
    some = np.random.default_rng(0).permutation(len(rows))[: int(images)]
    csv.write_csv(rows.take(pa.array(some)), Path(out).with_suffix(".csv"))
    begun, used = time.perf_counter(), os.times()
    pack(
        Path(out).with_suffix(".csv"),
        out,
        PackOptions(columns=Columns(), image_root=Path(table).parent, image_size_px=256, color="grey"),
    )
    now = os.times()
    cpu = sum(now[:4]) - sum(used[:4])
    return {"images": int(images), "per_core": int(images) / cpu, "s": time.perf_counter() - begun, "mib": peak_mib()}


def decode_originals(table: str) -> dict[str, float]:
    import cv2

    cv2.setNumThreads(0)
    files = [str(Path(table).parent / name) for name in csv.read_csv(table)["file"].to_pylist()[:1500]]
    used = time.process_time()
    for file in files:
        cv2.resize(np.asarray(cv2.imread(file)), (224, 224))
    return {"per_core": len(files) / (time.process_time() - used)}


def large_set(folder: Path, num_shards: int, per_shard: int = 8) -> None:
    """A set of many small shards: hard links to a few tars, under an index that gives every sample a key of its own."""
    import cv2

    from medtl_dist.data.encoding import Stored
    from medtl_dist.data.shard_writer import Facts, SetWriter, describe_index, write_dataset_file
    from medtl_dist.data.shards import INDEX_FIELDS, INDEX_FILE

    first = folder.with_name("first")
    first.mkdir()
    folder.mkdir()
    rng = np.random.default_rng(0)
    writer = SetWriter(first, pa.schema([]), "jpg")
    writer.begin_split("train", per_shard)
    for number in range(per_shard):
        data = cv2.imencode(".jpg", rng.integers(0, 255, (64, 64), np.uint8))[1].tobytes()
        stored = Stored(data, hashlib.sha256(data).digest(), 64, 64, 1)
        writer.add(Facts(bytes([number]) * 16, f"{number:032x}", number % 2, "ab"[number % 2], None, {}), stored)
    (shard,) = writer.end_split()
    writer.finish()
    row = pq.read_table(first / INDEX_FILE)
    for number in range(num_shards):
        source = folder / f"train-{number - number % 30_000:06d}.tar"  # a file has a limited number of links
        target = folder / f"train-{number:06d}.tar"
        if number % 30_000 == 0:
            shutil.copyfile(first / shard["name"], target)
        else:
            os.link(source, target)
    total = num_shards * per_shard
    columns = {name: pa.concat_arrays([row[name].combine_chunks()] * num_shards) for name in row.column_names}
    keys = rng.bytes(16 * total)
    columns["key"] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), total, [None, pa.py_buffer(keys)])
    columns["shard"] = pa.array(np.repeat([f"train-{n:06d}.tar" for n in range(num_shards)], per_shard))
    with pq.ParquetWriter(
        folder / INDEX_FILE, pa.schema(INDEX_FIELDS), compression="zstd", store_schema=False
    ) as index:
        index.write_table(pa.table(columns, pa.schema(INDEX_FIELDS)), row_group_size=per_shard)
    entry = {"samples": total, "groups": per_shard, "classes": {"a": total // 2, "b": total // 2}, "domains": {}}
    shards = [shard | {"name": f"train-{number:06d}.tar"} for number in range(num_shards)]
    info = {
        "format_version": 1,
        "task": "binary",
        "classes": ["a", "b"],
        "positive_class": "b",
        "preprocessing": {"image_size_px": 64, "color": "grey"},
        "splits": {"train": entry | {"shards": shards}},
        "group_source": "none",
        "index": describe_index(folder / INDEX_FILE),
    }
    write_dataset_file(folder, info)


def start_up(folder: str, where: str, workers: str) -> dict[str, float]:
    begun = time.perf_counter()
    from medtl_dist.data.loader import Loader
    from medtl_dist.data.shards import open_dataset
    from medtl_dist.data.stream import train_batches
    from medtl_dist.data.transforms import TrainTransform

    imported = time.perf_counter()
    dataset = open_dataset(folder)
    opened = time.perf_counter()
    samples = sum(shard.samples for shard in dataset.shards("train"))
    step = samples // BATCH // 2 if where == "middle" else 0
    with Loader(int(workers)) as loader:
        options: Any = {"transform": TrainTransform(64), "global_batch_size": BATCH, "seed": 0, "epoch": 0}
        next(iter(train_batches(dataset, start_step=step, loader=loader, **options)))
        ready = time.perf_counter()
        loaders = [resident_mib(pid) for pid in loader.process_ids]
    return {
        "open_s": opened - imported,
        "batch_s": ready - opened,
        "mib": resident_mib(),
        "loader_mib": max(loaders, default=0.0),
        "begun": begun,
    }


def ten_epochs(folder: str) -> dict[str, Any]:
    from medtl_dist.data import pieces
    from medtl_dist.data.loader import Loader
    from medtl_dist.data.shards import open_dataset
    from medtl_dist.data.stream import run_length_of, train_batches
    from medtl_dist.data.transforms import TrainTransform

    dataset = open_dataset(folder)
    options: Any = {"transform": TrainTransform(224), "global_batch_size": BATCH, "seed": 0}
    ours, loaders = [], []
    with Loader(1) as loader:
        for epoch in range(10):
            for _ in train_batches(dataset, epoch=epoch, loader=loader, **options):
                pass
            ours.append(resident_mib())
            loaders.append(resident_mib(loader.process_ids[0]))
    reads = 0
    pread = pieces._pread

    def counted(*args: Any) -> bytes:
        nonlocal reads
        reads += 1
        return pread(*args)

    pieces._pread = counted
    for _ in train_batches(dataset, epoch=10, **options):
        pass
    length = run_length_of(dataset, "train", BATCH)
    runs = sum(-(-shard.samples // length) for shard in dataset.shards("train"))
    return {"ours": ours, "loader": loaders, "reads": reads, "runs": runs, "run_length": length}


PARTS = {f.__name__: f for f in (pack_table, decode_originals, start_up, ten_epochs)}


def apart(name: str, *args: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "--part", name, *map(str, args)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="*", help="labels.csv with columns file and label")
    parser.add_argument("--images", type=int, default=580, help="packed, and then ten times as many")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](*args.table)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        table = args.table[0]
        originals = apart("decode_originals", table)["per_core"]
        for images in (args.images, 10 * args.images):
            found = apart("pack_table", table, work / f"set{images}", images)
            epochs = originals / found["per_core"]
            print(
                f"packing {images:,} images: {found['per_core']:.0f} images/s/core, {found['s']:.0f} s, peak "
                f"{found['mib']:.0f} MiB; it costs as much as {epochs:.1f} epochs of decoding the originals",
                flush=True,
            )
        large_set(work / "large", args.shards)
        for where, workers in (("beginning", 0), ("middle", 0), ("beginning", 2)):
            found = apart("start_up", work / "large", where, workers)
            print(
                f"start-up, {args.shards:,} shards, {where} of an epoch, {workers} loader processes: opened in "
                f"{found['open_s']:.1f} s, first batch {found['batch_s']:.1f} s later; {found['mib']:.0f} MiB, loader "
                f"{found['loader_mib']:.0f} MiB",
                flush=True,
            )
        found = apart("ten_epochs", work / f"set{args.images}")
        for who in ("ours", "loader"):
            print(f"memory after each of ten epochs, {who}: {' '.join(f'{mib:.0f}' for mib in found[who])} MiB")
        print(f"reads: {found['reads']} for {found['runs']} runs of ≤ {found['run_length']} samples")


if __name__ == "__main__":
    main()
