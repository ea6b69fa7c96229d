"""store → bytes of a weights file, for ``model.weights`` that is an address: checked, and never run.

A checkpoint's weights file holds what learns. What was frozen lies beside it, in a file of its own that many checkpoints share.
"""

from __future__ import annotations

import hashlib
import json

from medtl_dist.errors import DataError, UserError
from medtl_dist.storage import StorageOptions, parse_place
from medtl_dist.store_folder import StoreFolder, store_folder

FROZEN_FILE = "frozen.safetensors"


def read_weights(address: str, storage: StorageOptions | None = None) -> tuple[bytes, str]:
    """The file at an ``s3://`` or ``gs://`` address, and its sha256 (hex), which in a run's checkpoint is what its manifest says.

    Raises:
        UserError: another kind of address, or no such file.
        DataError: a checkpoint's file that differs from its manifest, or whose manifest is missing or damaged.
        Interrupted: the store can't be reached.
    """
    place = parse_place(address)
    if place.scheme not in ("s3", "gs") or "/" not in place.path:
        raise UserError(
            f"model.weights: {place.url}: weights are read from a local file or from a file in s3:// or gs://."
        )
    above, _, name = place.url.rpartition("/")
    folder = store_folder(above, storage or StorageOptions())
    if not folder.exists(name):
        raise UserError(
            f"model.weights: no file {place.url}; give imagenet, random or the place of a .pth or .safetensors file"
        )
    data = folder.read(name)
    digest = hashlib.sha256(data).hexdigest()
    if step_of(place.path) is not None and digest != _listed(folder, name):
        raise DataError(f"{place.url}: differs from its checksum")
    return data, digest


def read_frozen(address: str, storage: StorageOptions | None = None) -> tuple[bytes, str] | None:
    """As ``read_weights``, of what lies beside a checkpoint's weights file at this address; None: nothing does."""
    above, _, _ = address.rpartition("/")
    if step_of(address) is None or not store_folder(above, storage or StorageOptions()).exists(FROZEN_FILE):
        return None
    return read_weights(f"{above}/{FROZEN_FILE}", storage)


def sha256_of_both(learned: str, frozen: str | None) -> str:
    """What a checkpoint's weights are known by: the sha256 of the one file, or of the two files' in hex, one after the other."""
    return learned if frozen is None else hashlib.sha256((learned + frozen).encode()).hexdigest()


def step_of(path: str) -> int | None:
    """The step of the checkpoint that a file is in, by its path: ``…/checkpoints/<step>/…``, in stores ``<step>-<fence>``."""
    parts = path.split("/")
    numbers = parts[-2].split("-") if len(parts) > 3 and parts[-3] == "checkpoints" else []
    return int(numbers[0]) if 0 < len(numbers) < 3 and all(number.isdecimal() for number in numbers) else None


def _listed(folder: StoreFolder, name: str) -> str:
    try:
        return str(json.loads(folder.read("manifest.json"))["files"][name]["sha256"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder.shown('manifest.json')}: damaged") from None
