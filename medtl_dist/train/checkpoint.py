"""fit → checkpoints: written, verified, found and retained in the run folder by the core alone.

``checkpoints/<step>/`` holds ``model.safetensors`` (the weights that are scored), ``state.pt`` (optimiser, scaler, RNG, and the
weights that learn where others are scored: loadable with ``weights_only=True``), ``meta.json`` (position, classes,
preprocessing, history) and, written last, ``manifest.json`` with the SHA-256 of the others. Without a manifest that
verifies it is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from medtl_dist.errors import DataError
from medtl_dist.run import Folder

FORMAT_VERSION = 1
_FILES = ("model.safetensors", "state.pt", "meta.json")


def save(
    folder: Folder, step: int, *, weights: Mapping[str, Tensor], state: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Write the checkpoint of ``step``; it exists once its manifest does. Raises OSError (disk full): nothing is lost."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    contents = {
        "model.safetensors": safetensors.torch.save(
            {name: t.detach().cpu().contiguous() for name, t in weights.items()}
        ),
        "state.pt": buffer.getvalue(),
        "meta.json": json.dumps(meta, indent=1, allow_nan=False).encode(),
    }
    place = _place(step)
    folder.delete_tree(place)  # a remnant of an interrupted write of the same step
    for name, data in contents.items():
        folder.write(f"{place}/{name}", data)
    files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    folder.write(
        f"{place}/manifest.json", json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1).encode()
    )


def steps(folder: Folder) -> list[int]:
    """Steps that have a checkpoint folder, whole or not, ascending."""
    return sorted(int(name) for name in folder.names("checkpoints") if name.isdigit())


def verify(folder: Folder, step: int) -> dict[str, bytes]:
    """The files of a checkpoint, each checked against the manifest. Raises DataError naming the file that fails."""
    place = _place(step)
    if not folder.exists(f"{place}/manifest.json"):
        raise DataError(f"{folder.at(place)}: no manifest, so it was never completed")
    try:
        listed = json.loads(folder.read(f"{place}/manifest.json"))
        version, files = listed["format_version"], {name: listed["files"][name] for name in _FILES}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder.at(place)}/manifest.json: damaged") from None
    if version != FORMAT_VERSION:
        raise DataError(f"{folder.at(place)}: format version {version}, this program reads {FORMAT_VERSION}")
    contents: dict[str, bytes] = {}
    for name in _FILES:
        data = folder.read(f"{place}/{name}")
        if len(data) != files[name]["bytes"] or hashlib.sha256(data).hexdigest() != files[name]["sha256"]:
            raise DataError(f"{folder.at(place)}/{name}: differs from its checksum")
        contents[name] = data
    return contents


def latest(folder: Folder, warn: Callable[[str], None]) -> int | None:
    """The newest step whose checkpoint verifies; each damaged one passed over is told to ``warn``."""
    for step in reversed(steps(folder)):
        try:
            verify(folder, step)
        except DataError as error:
            warn(f"checkpoint passed over: {error.message}")
        else:
            return step
    return None


def load(folder: Folder, step: int) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """``(weights, state, meta)`` of a verified checkpoint, on the CPU; runs no code from it. Raises DataError."""
    contents = verify(folder, step)
    try:
        weights = safetensors.torch.load(contents["model.safetensors"])
        state = torch.load(io.BytesIO(contents["state.pt"]), map_location="cpu", weights_only=True)
        meta = json.loads(contents["meta.json"])
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise DataError(f"{folder.at(_place(step))}: can't be loaded ({type(error).__name__})") from None
    return weights, state, meta


def load_meta(folder: Folder, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself, verified. Raises DataError."""
    return json.loads(verify(folder, step)["meta.json"])


def retain(folder: Folder, *, best: int | None, newest: int) -> None:
    """Delete all but the best checkpoint, ``newest`` and the one before it.

    What lies beyond ``newest`` did not verify when the run went on from an older checkpoint: it goes too.
    """
    present = steps(folder)
    kept = {best, *[step for step in present if step <= newest][-2:]}
    for step in present:
        if step not in kept:
            folder.delete_tree(_place(step))


def _place(step: int) -> str:
    return f"checkpoints/{step:08d}"
