"""Tars made by hand: members with any header, images that are bombs, and sets whose index agrees with hostile tars."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
from shard_sets import image_of

from medtl_dist.data.shards import INDEX_FIELDS, Dataset, open_dataset

END = bytes(1024)


def png(number: int, channels: int = 1) -> bytes:
    """A small whole PNG."""
    return cv2.imencode(".png", image_of(number, channels=channels)[:, :, ::-1])[1].tobytes()


def member(name: bytes | str, data: bytes = b"", **header: Any) -> bytes:
    """One member as bytes: a USTAR header with a right checksum, whatever the fields say, and padded data.

    ``header``: ``kind`` (type flag), ``size`` (as claimed), ``link``, ``magic``, ``checksum`` (a wrong one).
    """
    raw = name.encode() if isinstance(name, str) else name
    block = bytearray(512)
    block[: len(raw)] = raw
    block[100:136] = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % header.get("size", len(data))
    block[136:148] = b"00000000000\0"
    block[156:157] = header.get("kind", b"0")
    link = header.get("link", b"")
    block[157 : 157 + len(link)] = link
    block[257:265] = header.get("magic", b"ustar\x0000")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % header.get("checksum", sum(block))
    return bytes(block) + data + bytes(-len(data) % 512)


def pax(**records: str) -> bytes:
    """A PAX header for the member that follows."""
    return member("PaxHeader", b"".join(pax_record(key, value.encode()) for key, value in records.items()), kind=b"x")


def pax_record(key: str, value: bytes) -> bytes:
    body = b" " + key.encode() + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


def sample(key: str, number: int, image: bytes | None = None) -> bytes:
    """The members of one sample as webdataset orders them: .cls, then .png."""
    data = png(number) if image is None else image
    return member(f"{key}.cls", b"%d" % (number % 2)) + member(f"{key}.png", data)


def png_of(width: int, height: int, *, bits: int = 8, extra: bytes = b"") -> bytes:
    """A black grey PNG of any size, never in memory as a whole; ``extra``: chunks before the pixels."""
    squeeze = zlib.compressobj(1)
    row = bytes(1 + -(-width * bits // 8))
    rows = row * 100
    parts = [squeeze.compress(rows) for _ in range(height // 100)]
    parts += [squeeze.compress(row * (height % 100)), squeeze.flush()]
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", b"".join(parts)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk with its CRC."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def squeezed_zeros(num_bytes: int) -> bytes:
    """zlib data that swells to so many bytes."""
    squeeze = zlib.compressobj(9)
    parts = [squeeze.compress(bytes(2**20)) for _ in range(num_bytes // 2**20)]
    return b"".join([*parts, squeeze.flush()])


def members_of(tar: bytes) -> list[tuple[str, int, bytes]]:
    """name, offset and data of the regular files by the standard library, for tars that it reads."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return [
            (info.name, info.offset_data, archive.extractfile(info).read())  # type: ignore[union-attr]
            for info in archive
            if info.isreg()
        ]


def write_around(folder: Path, tar: bytes, images: Sequence[tuple[str, int, bytes, int]]) -> Dataset:
    """A set of one shard ``val-000000.tar`` that is consistent whatever the tar holds; ``images``: key (hex), offset,
    bytes and label of each row of the index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "val-000000.tar").write_bytes(tar)
    rows = [
        {
            "key": bytes.fromhex(key), "sha256": hashlib.sha256(data).digest(), "split": "val", "domain": None,
            "label": label, "group": key, "shard": "val-000000.tar", "offset": offset, "size": len(data),
            "width": 24, "height": 20, "channels": 1,
        }
        for key, offset, data, label in images
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(INDEX_FIELDS)), folder / "index.parquet", store_schema=False)
    index = (folder / "index.parquet").read_bytes()
    classes = {name: sum(label == i for *_, label in images) for i, name in enumerate(("0", "1"))}
    shard = {"name": "val-000000.tar", "samples": len(rows), "bytes": len(tar), "sha256": _sha256(tar)}
    info = {
        "format_version": 1, "task": "binary", "classes": ["0", "1"], "positive_class": "1",
        "preprocessing": {"image_size_px": None, "color": "grey", "encoding": "png"},
        "splits": {"val": {"samples": len(rows), "groups": len(rows), "classes": classes, "domains": {},
                           "shards": [shard]}},
        "group_source": "none",
        "index": {"name": "index.parquet", "bytes": len(index), "sha256": _sha256(index)},
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(info))
    return open_dataset(folder)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
