"""fit → checkpoints: written, verified, found and retained in the run folder by the core alone.

``checkpoints/<step>/`` holds ``model.safetensors`` (the weights that are scored; those of frozen stages, where there are any,
in ``frozen.safetensors``), ``state.pt`` (optimiser, scaler, RNG, and the weights that learn where others are scored: loadable
with ``weights_only=True``), ``meta.json`` (position, classes, preprocessing, history) and, written last, ``manifest.json`` with
the SHA-256 of the others. Without a manifest that verifies it is not a checkpoint.

What is frozen is written once: the checkpoints after it link that file (in a store: have the store copy it).

In a store the folder is ``checkpoints/<step>-<fence>/``: nothing that a writer still does after it has lost its lease can touch
what its successor, whose fence is higher, has written. The newest checkpoint is the highest fence's.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from medtl_dist.errors import DataError
from medtl_dist.models.weights_store import FROZEN_FILE
from medtl_dist.run import Folder
from medtl_dist.store_folder import StoreFolder

FORMAT_VERSION = 2
_READABLE = (1, FORMAT_VERSION)  # 1: without frozen.safetensors
WEIGHTS_FILE = "model.safetensors"
_FILES = (WEIGHTS_FILE, "state.pt", "meta.json")


@dataclass(frozen=True)
class Frozen:
    """The weights that do not learn, as the checkpoint in the folder ``place`` holds them.

    ``tensors`` are those themselves with the count of their changes at the time: held, so that none's memory is another's.
    """

    place: str
    entry: Mapping[str, Any]
    tensors: Mapping[str, tuple[Tensor, int]]

    def holds(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether these are the same tensors, unchanged since."""
        return self.tensors.keys() == weights.keys() and all(
            (tensor.data_ptr(), tensor._version) == (self.tensors[name][0].data_ptr(), self.tensors[name][1])
            for name, tensor in weights.items()
        )


def save(
    folder: Folder,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    frozen: Collection[str] = (),
    before: Frozen | None = None,
) -> Frozen | None:
    """Write the checkpoint of ``step``; it exists once its manifest does. Raises OSError (disk full): nothing is lost.

    ``frozen``: names of the weights that do not learn. ``before``: what an earlier call for this run folder has returned: where
    those weights have not changed since, they are not written again.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    contents = {
        WEIGHTS_FILE: _serialised({name: t for name, t in weights.items() if name not in frozen}),
        "state.pt": buffer.getvalue(),
        "meta.json": json.dumps(meta, indent=1, allow_nan=False).encode(),
    }
    fence = _fence(folder)
    place = f"checkpoints/{_name(step, fence)}"
    folder.delete_tree(place)  # a remnant of an interrupted write of the same step
    for name, data in contents.items():
        folder.write(f"{place}/{name}", data)
    files = {name: _entry_of(data) for name, data in contents.items()}
    kept = _save_frozen(folder, place, {name: t for name, t in weights.items() if name in frozen}, before)
    if kept is not None:
        files[FROZEN_FILE] = dict(kept.entry)
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "files": files}
    _make_sure(folder)
    folder.write(
        f"{place}/manifest.json", json.dumps(manifest | ({"fence": fence} if fence else {}), indent=1).encode()
    )
    return kept


def _save_frozen(folder: Folder, place: str, weights: Mapping[str, Tensor], before: Frozen | None) -> Frozen | None:
    if not weights:
        return None
    tensors = {name: (tensor, tensor._version) for name, tensor in weights.items()}
    if before is not None and before.holds(weights):
        try:
            folder.link(f"{before.place}/{FROZEN_FILE}", f"{place}/{FROZEN_FILE}")
            return Frozen(place, before.entry, tensors)
        except (DataError, FileNotFoundError):  # somebody has deleted it
            pass
    data = _serialised(weights)
    folder.write(f"{place}/{FROZEN_FILE}", data)
    return Frozen(place, _entry_of(data), tensors)


def _serialised(weights: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})


def _entry_of(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def steps(folder: Folder) -> list[int]:
    """Steps that have a checkpoint folder, whole or not, ascending."""
    return sorted({step for _, step in _listed(folder)})


def parse_name(name: str) -> tuple[int, int] | None:
    """``(fence, step)`` of a checkpoint folder's name, the fence 0 where it has none; None for another name."""
    step, _, fence = name.partition("-")
    return (int(fence or 0), int(step)) if step.isdigit() and (fence or "0").isdigit() else None


def verify(folder: Folder, step: int) -> dict[str, bytes]:
    """The files of a checkpoint, each checked against the manifest. Raises DataError naming the file that fails."""
    return _verified(folder, step)[1]


def weights_name(folder: Folder, step: int) -> str:
    """The name, in the run folder, of a checkpoint's weights file, its files checked. Raises as :func:`verify`."""
    return f"{_verified(folder, step)[0]}/{WEIGHTS_FILE}"


def files_of(folder: Folder, step: int) -> dict[str, bytes]:
    """The files of a checkpoint, its manifest too, by their names in a run folder on a disk. Raises as :func:`verify`."""
    place, contents = _verified(folder, step)
    contents |= {"manifest.json": folder.read(f"{place}/manifest.json")}
    return {f"checkpoints/{_name(step, None)}/{name}": data for name, data in contents.items()}


def _verified(folder: Folder, step: int) -> tuple[str, dict[str, bytes]]:
    """The checkpoint's folder and files; in a store the highest fence's of those that verify."""
    if not folder.remote:
        place = f"checkpoints/{_name(step, None)}"
        return place, _verify(folder, place)
    failure: DataError | None = None
    for fence, found in sorted(_listed(folder), reverse=True):
        if found == step:
            place = f"checkpoints/{_name(step, fence or None)}"
            try:
                return place, _verify(folder, place)
            except DataError as error:
                failure = failure or error
    raise failure or DataError(f"{folder.url}/checkpoints/{_name(step, None)}: there is no such checkpoint")


def _verify(folder: Folder, place: str) -> dict[str, bytes]:
    if not folder.exists(f"{place}/manifest.json"):
        raise DataError(f"{folder.url}/{place}: no manifest, so it was never completed")
    try:
        listed = json.loads(folder.read(f"{place}/manifest.json"))
        version, files = listed["format_version"], {name: listed["files"][name] for name in _FILES}
        if FROZEN_FILE in listed["files"]:
            files[FROZEN_FILE] = listed["files"][FROZEN_FILE]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder.url}/{place}/manifest.json: damaged") from None
    if version not in _READABLE:
        raise DataError(f"{folder.url}/{place}: format version {version}, this program reads {FORMAT_VERSION}")
    contents: dict[str, bytes] = {}
    for name in files:
        data = folder.read(f"{place}/{name}")
        if len(data) != files[name]["bytes"] or hashlib.sha256(data).hexdigest() != files[name]["sha256"]:
            raise DataError(f"{folder.url}/{place}/{name}: differs from its checksum")
        contents[name] = data
    return contents


def latest(folder: Folder, warn: Callable[[str], None]) -> int | None:
    """The newest step whose checkpoint verifies; each damaged one passed over is told to ``warn``."""
    for _, step in sorted(_listed(folder), reverse=True):
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
        weights = safetensors.torch.load(contents[WEIGHTS_FILE])
        if FROZEN_FILE in contents:
            weights |= safetensors.torch.load(contents[FROZEN_FILE])
        state = torch.load(io.BytesIO(contents["state.pt"]), map_location="cpu", weights_only=True)
        meta = json.loads(contents["meta.json"])
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise DataError(
            f"{folder.url}/checkpoints/{_name(step, None)}: can't be loaded ({type(error).__name__})"
        ) from None
    return weights, state, meta


def load_meta(folder: Folder, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself, verified. Raises DataError."""
    return json.loads(verify(folder, step)["meta.json"])


def newest_meta(folder: Folder) -> dict[str, Any] | None:
    """What the newest completed checkpoint says of itself, without a look at its weights; None where there is none."""
    for fence, step in sorted(_listed(folder), reverse=True):
        place = f"checkpoints/{_name(step, fence or None)}"
        with contextlib.suppress(DataError, ValueError, KeyError, TypeError):
            listed = json.loads(folder.read(f"{place}/manifest.json"))["files"]["meta.json"]
            data = folder.read(f"{place}/meta.json")
            if hashlib.sha256(data).hexdigest() == listed["sha256"]:
                return json.loads(data)
    return None


def retain(folder: Folder, *, best: int | None, newest: int) -> None:
    """Delete all but the best checkpoint, ``newest`` and the one before it.

    What lies beyond ``newest`` did not verify when the run went on from an older checkpoint: it goes too. Of what a holder
    of a later lease has written nothing goes.
    """
    own = _fence(folder) or 0
    present = [(fence, step) for fence, step in _listed(folder) if fence <= own]
    kept = {best, *sorted({step for _, step in present if step <= newest})[-2:]}
    doomed = [(fence, step) for fence, step in present if step not in kept]
    if doomed:
        _make_sure(folder)
    for fence, step in doomed:
        folder.delete_tree(f"checkpoints/{_name(step, fence or None)}")


def _listed(folder: Folder) -> list[tuple[int, int]]:
    return [found for name in folder.names("checkpoints") if (found := parse_name(name)) is not None]


def _name(step: int, fence: int | None) -> str:
    return f"{step:08d}" if fence is None else f"{step:08d}-{fence:06d}"


def _fence(folder: Folder) -> int | None:
    return folder.fence if isinstance(folder, StoreFolder) else None


def _make_sure(folder: Folder) -> None:
    """Raises Interrupted where another process has taken the folder's lease over."""
    if isinstance(folder, StoreFolder) and folder.guard is not None:
        folder.guard(now=True)
