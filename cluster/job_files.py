"""A finished run's small files ─► a framed block in the job's log ─► the client's folder.

Ray's job server has no download, and a client need not see the cluster's storage nor hold its keys; what it always can
read, with the token it has, is the job's log. So results and report travel there: compressed, with a checksum, bounded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import zlib
from pathlib import Path

from medtl_dist.errors import DataError
from medtl_dist.storage import Folder

# What a client fetches: facts and reports of a training, a chain, a sweep or a cross-validation. No images, scores or weights.
NAMES = (
    "results.json", "report.html", "chain.json", "compare.json", "sweep.json", "sweep.html", "crossval.json", "crossval.html",
)  # fmt: skip
PACKED_BYTES = 8 * 2**20
UNPACKED_BYTES = 64 * 2**20
_LINE = 4096
_FRAME = re.compile(
    r"^-----BEGIN MEDTL FILES sha256=([0-9a-f]{64}) bytes=([0-9]{1,9})-----\n(.*?)\n-----END MEDTL FILES-----$",
    re.S | re.M,
)


def framed(folder: Folder) -> str | None:
    """The files of ``NAMES`` that the folder holds as a block of text; None where there is none, or too much."""
    found = {name: folder.read(name).decode("utf-8", "replace") for name in NAMES if folder.exists(name)}
    packed = zlib.compress(json.dumps(found).encode(), 9)
    if not found or len(packed) > PACKED_BYTES:
        return None
    text = base64.b64encode(packed).decode("ascii")
    lines = "\n".join(text[start : start + _LINE] for start in range(0, len(text), _LINE))
    digest = hashlib.sha256(packed).hexdigest()
    return f"-----BEGIN MEDTL FILES sha256={digest} bytes={len(packed)}-----\n{lines}\n-----END MEDTL FILES-----"


def unframed(log: str) -> dict[str, str] | None:
    """The files of the log's last block; None without one. Raises DataError where it is damaged."""
    blocks = _FRAME.findall(log)
    if not blocks:
        return None
    digest, size, text = blocks[-1]
    damaged = DataError(
        "the job's log holds a damaged report; read it from the run folder, or submit again to fetch it."
    )
    if int(size) > PACKED_BYTES or len(text) > 2 * PACKED_BYTES:
        raise damaged
    try:
        packed = base64.b64decode(text.replace("\n", ""), validate=True)
        unpacker = zlib.decompressobj()
        tree = json.loads(unpacker.decompress(packed, UNPACKED_BYTES))
    except (binascii.Error, zlib.error, ValueError):
        raise damaged from None
    right = len(packed) == int(size) and hashlib.sha256(packed).hexdigest() == digest and isinstance(tree, dict)
    if not right or not all(name in NAMES and isinstance(content, str) for name, content in tree.items()):
        raise damaged
    return tree


def without_frames(log: str) -> str:
    """The log as a person reads it; a block that is still being written is left out too."""
    text = re.sub(_FRAME, "", log)
    start = text.find("-----BEGIN MEDTL FILES ")
    return text if start < 0 else text[:start]


def save(files: dict[str, str], folder: Path) -> list[Path]:
    """Write fetched files; their names are of ``NAMES`` only. Raises OSError."""
    place = Folder.local(folder)
    for name, content in files.items():
        place.write(name, content.encode())
    return [folder / name for name in files]
