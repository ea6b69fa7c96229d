"""one tar of another tool ─► its samples, looked at: the part of ``adopt`` that worker processes do."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field

from medtl_dist.data.shard_check import open_regular
from medtl_dist.data.sidecars import BadSample, Fields, Look, Told, look_at, parse_json, read_told
from medtl_dist.data.tars import Refused, TarSample, read_members, read_samples
from medtl_dist.errors import DataError


@dataclass(frozen=True, slots=True)
class Found:
    """A usable sample of a foreign tar. ``key``: as webdataset has it; ``file``: the name of its image member."""

    key: str
    file: str
    offset: int
    size: int
    sha256: bytes
    look: Look
    told: Told
    dotted: bool


@dataclass(frozen=True)
class Task:
    """A tar to read."""

    folder: str
    name: str
    split: str
    fields: Fields


@dataclass
class ReadTar:
    """A tar as read. ``seen``: which of the fields asked for occur in it; ``names``: fields of its first .json; ``classed``:
    whether any sample has a .cls member."""

    name: str
    split: str
    length: int = 0
    sha256: str = ""
    samples: list[Found] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    names: list[str] = field(default_factory=list)
    classed: bool = False


def read_tar(task: Task) -> ReadTar:
    """Reads one foreign tar: every sample looked at, everything that is wrong with it in ``refused``."""
    tar = ReadTar(task.name, task.split)
    try:
        file, tar.length = open_regular(os.path.join(task.folder, task.name))
        with file:
            tar.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            for sample in read_samples(read_members(file, tar.length)):
                if isinstance(sample, Refused):
                    tar.refused.append(sample)
                else:
                    _take(tar, sample, task)
    except OSError as error:
        tar.refused.append(Refused(0, f"cannot be read ({error.strerror})"))
    except DataError as error:
        tar.refused.append(Refused(0, str(error)))
    if not tar.samples and not tar.refused:
        tar.refused.append(Refused(0, "a tar without samples"))
    return tar


def _take(tar: ReadTar, sample: TarSample, task: Task) -> None:
    image = sample.image
    tar.classed = tar.classed or "cls" in sample.texts
    try:
        if "json" in sample.texts and (len(tar.seen) < len(task.fields.names) or not tar.names):
            names = parse_json(sample.texts["json"].data).keys()
            tar.seen |= task.fields.names & names
            tar.names = tar.names or sorted(names)
        told = read_told(sample, task.split, task.fields)
        look = look_at(image.data)
    except BadSample as bad:
        tar.refused.append(Refused(sample.number, str(bad), image.name))
        return
    digest = hashlib.sha256(image.data).digest()
    dotted = "." in image.suffix
    tar.samples.append(Found(sample.key, image.name, image.offset, len(image.data), digest, look, told, dotted))
