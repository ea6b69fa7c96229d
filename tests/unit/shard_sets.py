"""A tiny shard set written by plain ``tarfile`` and ``pyarrow``, independent of the code that packs real ones."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medtl_dist.data.shards import INDEX_FIELDS, Dataset, open_dataset
from medtl_dist.data.transforms import EvalTransform


class Negative(EvalTransform):
    """A transform of the tests' own: black for white."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return 255 - super().__call__(image)


def key_of(split: str, number: int) -> str:
    """The key (hex) of the ``number``-th sample of a split."""
    return hashlib.sha256(f"{split}/{number}".encode()).hexdigest()[:32]


def image_of(number: int, size: tuple[int, int] = (20, 24), channels: int = 1) -> np.ndarray:
    """uint8 [h, w, channels]: smooth, and different for each number."""
    height, width = size
    y, x, c = np.mgrid[:height, :width, :channels]
    return (127 + 80 * np.sin(0.2 * x + number) * np.cos(0.15 * y + 0.7 * number + c)).astype(np.uint8)


def write_set(
    folder: Path,
    shards: dict[str, list[int]],
    *,
    channels: int = 1,
    size: tuple[int, int] = (20, 24),
    encoding: str = ".png",
) -> Dataset:
    """Writes and opens a set; ``shards``: samples per shard of each split. Sample i of a split has label i % 2, group
    ``p<i // 3>`` and domain ``a`` or null."""
    folder.mkdir(parents=True, exist_ok=True)
    tables: list[pa.Table] = []
    splits: dict[str, dict] = {}
    for split in sorted(shards):
        listed = []
        first = 0
        for position, count in enumerate(shards[split]):
            name = f"{split}-{position:06d}.tar"
            images = [image_of(first + i, size, channels) for i in range(count)]
            rows = _write_tar(folder / name, split, first, images, encoding)
            raw = (folder / name).read_bytes()
            listed.append(
                {"name": name, "samples": count, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
            )
            tables.append(pa.Table.from_pylist(rows, schema=pa.schema(INDEX_FIELDS)))
            first += count
        splits[split] = {"samples": first, "groups": 1, "classes": {}, "domains": {}, "shards": listed}
    with pq.ParquetWriter(folder / "index.parquet", pa.schema(INDEX_FIELDS)) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    write_info(folder, splits, channels)
    return open_dataset(folder)


def write_info(folder: Path, splits: dict[str, dict], channels: int) -> None:
    """``dataset.json`` for what lies in the folder."""
    index = (folder / "index.parquet").read_bytes()
    info = {
        "format_version": 1,
        "task": "binary",
        "classes": ["NORMAL", "PNEUMONIA"],
        "positive_class": "PNEUMONIA",
        "preprocessing": {"image_size_px": None, "color": "grey" if channels == 1 else "rgb"},
        "splits": splits,
        "group_source": "column patient_id",
        "index": {"name": "index.parquet", "bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
    }
    (folder / "dataset.json").write_text(json.dumps(info))


def _write_tar(path: Path, split: str, first: int, images: list[np.ndarray], encoding: str) -> list[dict]:
    rows = []
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images, first):
            data = cv2.imencode(encoding, image[:, :, ::-1])[1].tobytes()
            key = key_of(split, number)
            member = tarfile.TarInfo(f"{key}{encoding}")
            member.size = len(data)
            offset = tar.offset + 512
            tar.addfile(member, io.BytesIO(data))
            note = tarfile.TarInfo(f"{key}.json")
            note.size = 2
            tar.addfile(note, io.BytesIO(b"{}"))
            rows.append(
                {
                    "key": bytes.fromhex(key),
                    "sha256": hashlib.sha256(data).digest(),
                    "split": split,
                    "domain": "a" if number % 2 else None,
                    "label": number % 2,
                    "group": f"p{number // 3}",
                    "shard": path.name,
                    "offset": offset,
                    "size": len(data),
                    "width": image.shape[1],
                    "height": image.shape[0],
                    "channels": image.shape[2],
                }
            )
    return rows
