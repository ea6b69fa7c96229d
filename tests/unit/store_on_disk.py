"""Stores for unit tests: addresses that lead into a folder of this machine, by the filesystem interface of a store."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs as pafs

from medtl_dist import store_folder
from medtl_dist.models import weights_store
from medtl_dist.storage import StorageOptions, parse_place
from medtl_dist.store_folder import StoreFolder
from medtl_dist.train import lease, run_folder, run_store


def stored_in(root: Path, patch: pytest.MonkeyPatch) -> None:
    """From now on ``s3://bucket/name`` is ``root/bucket/name``. Folders are to be made first: a disk has some."""

    def at(url: str, options: StorageOptions | None = None) -> StoreFolder:
        place = parse_place(url)
        tree = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
        return StoreFolder(tree, place.path, place, options or StorageOptions(retries=0))

    for module in (store_folder, weights_store, lease, run_folder):
        patch.setattr(module, "store_folder", at)
    patch.setattr(run_store, "folder_at", at)
