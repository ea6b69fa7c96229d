"""A store without a server: ``StoreFolder``'s own calls on a folder of this machine, where only one can make a file. Shard sets
are read there too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyarrow import fs

from medtl_dist import create_only, store_folder
from medtl_dist.data import ranges
from medtl_dist.errors import Interrupted
from medtl_dist.storage import StorageOptions, parse_place
from medtl_dist.store_folder import StoreFolder
from medtl_dist.train import lease, ledger, run_folder


class Stores:
    """``puts``: the names of all that was put, in order; ``gone``: every call fails, as when a store can't be reached."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.puts: list[str] = []
        self.calls = 0
        self.gone = False

    def path(self, url: str) -> Path:
        return self.root / url.partition("://")[2]

    def tree(self) -> fs.FileSystem:
        return fs.SubTreeFileSystem(str(self.root), fs.LocalFileSystem())

    def folder(self, url: str, options: StorageOptions | None = None) -> StoreFolder:
        place = parse_place(url)
        return _Fake(self.tree(), place.path, place, options or StorageOptions(), stores=self)

    def make(self, folder: StoreFolder, name: str, data: bytes) -> bool:
        target = self.root / folder.at(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        return True


@dataclass(frozen=True)
class _Fake(StoreFolder):
    stores: Stores | None = None

    def put(self, name: str, data: bytes) -> None:
        assert self.stores is not None
        self._tried(lambda: self._put(name, data), name, "written to")
        self.stores.puts.append(self.at(name).partition("/")[2])

    def _put(self, name: str, data: bytes) -> None:
        assert self.stores is not None
        target = self.stores.root / self.at(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part-{os.urandom(4).hex()}")
        part.write_bytes(data)
        part.replace(target)

    def _tried(self, act, name, verb, num_bytes=0):  # type: ignore[no-untyped-def]
        assert self.stores is not None
        self.stores.calls += 1
        if self.stores.gone:
            raise Interrupted(f"{self.shown(name)} can't be {verb}")
        return super()._tried(act, name, verb, num_bytes)


@contextmanager
def stores_in(root: Path) -> Iterator[Stores]:
    """``s3://`` and ``gs://`` addresses lie below ``root`` inside the block."""
    found = Stores(root)
    with pytest.MonkeyPatch.context() as patch:
        for module in (store_folder, ledger, lease, run_folder):
            patch.setattr(module, "store_folder", found.folder)
        patch.setattr(create_only, "_create_in_store", found.make)
        patch.setattr(ranges, "filesystem", lambda *_, **__: found.tree())
        ranges._ranges.cache_clear()
        yield found
    ranges._ranges.cache_clear()
