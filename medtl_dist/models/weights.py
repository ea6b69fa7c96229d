"""files → model: initial weights from a file, checked tensor by tensor; no code in the file is ever run."""

from __future__ import annotations

import io
import math
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from medtl_dist.errors import UserError
from medtl_dist.models import registry
from medtl_dist.models.grey import grey_from_rgb, rgb_from_grey
from medtl_dist.models.imagenet import HUB_FILE, imagenet_file, imagenet_file_names, sha256_of, sha256_start
from medtl_dist.models.normalise import Normalisation
from medtl_dist.models.registry import BackboneSpec, has_prefix
from medtl_dist.models.weights_store import FROZEN_FILE, read_frozen, read_weights, sha256_of_both, step_of
from medtl_dist.storage import StorageOptions

_NESTS = ("state_dict", "model_state_dict", "model")  # where training scripts put the tensors in a checkpoint
_HOW_TO_SAVE = "torch.save(model.state_dict(), 'weights.pth')"
_NUM_NAMED = 3
_REAL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # copied into float32; int8 and fp8 need scales


@dataclass(frozen=True)
class WeightsFile:
    """A file of initial weights: its path or address, the sha256 of its bytes (hex), what to call it in a report; ``data``: the
    bytes, where they were read from a store. ``frozen``: the path or bytes of what a checkpoint keeps apart; it counts in the
    sha256."""

    path: Path | str
    sha256: str
    label: str
    data: bytes | None = field(default=None, repr=False)
    frozen: Path | bytes | None = field(default=None, repr=False)


def find_weights(weights: str, spec: BackboneSpec, storage: StorageOptions | None = None) -> WeightsFile | None:
    """The file behind ``model.weights``, None for "random". Downloads ImageNet weights that are not cached yet; reads a file at
    an address whole.

    Needs no model: call it in the driver first, so that a mistake shows before any worker starts.

    Args:
        weights: "imagenet", "random" or the path or address of a file; its content is looked at by `load_weights`.
        storage: how a store is reached.

    Raises:
        UserError: no such file, a folder, one that can't be opened, one that carries the name of a torchvision
            download with another content, or ImageNet weights that are neither cached nor downloadable.
        DataError, Interrupted: as `weights_store.read_weights`.
    """
    if weights == "random":
        return None
    if weights == "imagenet":
        path = imagenet_file(spec)
        name = spec.hub if spec.hub and path.name == HUB_FILE else path.name
        return WeightsFile(path, sha256_of(path), f"ImageNet weights {name}")
    file = _in_store(weights, storage) if "://" in weights else _on_disk(weights)
    name = PurePath(file.path).name
    if name in imagenet_file_names() and not file.sha256.startswith(sha256_start(name)):
        raise UserError(
            f"model.weights: {file.path} is damaged: its sha256 starts with {file.sha256[:8]}, its name says "
            f"{sha256_start(name)}; download it again, or rename it if it is a file of your own"
        )
    return file


def _in_store(address: str, storage: StorageOptions | None) -> WeightsFile:
    data, sha256 = read_weights(address, storage)
    frozen, its_sha256 = read_frozen(address, storage) or (None, None)
    return WeightsFile(address, sha256_of_both(sha256, its_sha256), _label(address), data, frozen)


def _on_disk(weights: str) -> WeightsFile:
    path = Path(weights).expanduser()
    if path.is_dir():
        raise UserError(f"model.weights: {path} is a folder; give the .safetensors or .pth file in it")
    if not path.exists():
        raise UserError(
            f"model.weights: no file {path.absolute()}; "
            "give imagenet, random or the path of a .pth or .safetensors file"
        )
    frozen = path.with_name(FROZEN_FILE)
    parted = step_of(str(path.absolute())) is not None and frozen.is_file()
    try:
        sha256 = sha256_of_both(sha256_of(path), sha256_of(frozen) if parted else None)
        return WeightsFile(path, sha256, _label(path), frozen=frozen if parted else None)
    except OSError as error:
        raise UserError(f"model.weights: {path} can't be opened: {error.strerror}") from None


def _label(path: Path | str) -> str:
    """What to call a file that the user named, or a chain of trainings did."""
    place = PurePath(path if isinstance(path, str) else path.absolute())
    step = step_of(str(place))
    return f"weights file {place.name}" if step is None else f"checkpoint {step} of run {place.parents[2].name}"


def load_weights(
    model: nn.Module,
    spec: BackboneSpec,
    file: WeightsFile,
    rgb: Normalisation,
    grey: Normalisation,
    *,
    keep_head: bool = True,
) -> list[str]:
    """Copy the file's tensors into ``model`` (the backbone with its head in place); returns remarks for the user.

    The file holds a state dict: plain, inside "state_dict", "model_state_dict" or "model", and with or without a
    prefix such as "module.". Its first convolution may be RGB or grey, whatever the model's is; ``rgb`` and ``grey``
    are the normalisations that take one to the other. A head with another number of outputs, none, or
    ``keep_head=False`` leaves the model's new head. Position embeddings of another input size are interpolated; an
    auxiliary head is left out. Every other tensor has to be there with the model's shape, and no more.

    Raises:
        UserError: unreadable or unsafe file, missing, unknown or differently shaped tensors (the first few are named,
            and the backbone that they would fit), values that are NaN or infinite. The model is unchanged then.
    """
    expected: dict[str, Tensor] = model.state_dict()
    tensors = _without_prefix(tensors_of(file), expected)
    tensors, remarks = _present_names(tensors, spec)
    remarks += _fit_first_conv(tensors, expected, spec, rgb, grey)
    remarks += _fit_position(tensors, expected, spec) + _fit_head(tensors, expected, spec, keep_head)
    for name, tensor in expected.items():  # not used here; missing in files of old PyTorch versions, float in others
        if name.endswith("num_batches_tracked"):
            tensors[name] = tensors.get(name, tensor).to(tensor.dtype)
    _refuse_misfits(tensors, expected, spec, file.path)
    not_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise UserError(f"model.weights: {file.path} holds NaN or infinite values in {_some(not_finite)}")
    model.load_state_dict(tensors, strict=True)
    return remarks


def tensors_of(file: WeightsFile) -> dict[str, Tensor]:
    """The file's tensors, and those that a checkpoint keeps apart. Raises as :func:`read_tensors`."""
    tensors = read_tensors(file.path, file.data)
    if file.frozen is not None:
        place, data = (FROZEN_FILE, file.frozen) if isinstance(file.frozen, bytes) else (file.frozen, None)
        tensors |= read_tensors(place, data)
    return tensors


def read_tensors(path: Path | str, data: bytes | None = None) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of any other one as ``torch.save`` writes it, on the CPU.

    No code in the file is run: objects other than tensors and plain containers are refused. ``data``: its bytes, where it is no
    local file.

    Raises:
        UserError: a file that is refused, damaged, or without tensors.
    """
    try:
        if PurePath(path).suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path) if data is None else safetensors.torch.load(data)
        else:
            with warnings.catch_warnings():  # a TorchScript file, for one: the error that follows says enough
                warnings.simplefilter("ignore")
                content = torch.load(path if data is None else io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds, by where in the file the damage is
        raise UserError(_why_unreadable(path, error)) from None
    while isinstance(content, Mapping):
        nest = next((content[key] for key in _NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            break
        content = nest
    entries = content.items() if isinstance(content, Mapping) else []
    tensors = {str(name): value.detach() for name, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"model.weights: {path} holds no named tensors; save a state dict: {_HOW_TO_SAVE}")
    return tensors


def _why_unreadable(path: Path | str, error: Exception) -> str:
    text = str(error)
    refused = re.search(r"(?:GLOBAL|unrecognized function|unsupported class) (\S+)", text)
    if isinstance(error, pickle.UnpicklingError) and refused:
        return (
            f"model.weights: {path} was refused: it holds Python objects ({refused.group(1)}), which could run code "
            f"when opened; save the tensors alone: {_HOW_TO_SAVE}"
        )
    # Other texts are a bare number, or PyTorch's advice to switch its protection off.
    tells = isinstance(error, OSError | RuntimeError | safetensors.SafetensorError) and "weights_only" not in text
    reason = f": {text.splitlines()[0].partition('. ')[0][:120]}" if tells and text else ""
    return (
        f"model.weights: {path} can't be read as weights (truncated, or another kind of file?){reason}; "
        "expected a .safetensors file or a .pth state dict"
    )


def _without_prefix(tensors: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip what wrappers put before every name ("module." by DDP, "_orig_mod." by compile, "model." by Lightning)."""
    own = {name.partition(".")[0] for name in expected}
    while True:
        first = {name.partition(".")[0] for name in tensors}
        if len(first) != 1 or first <= own or not all("." in name for name in tensors):
            return tensors
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}


def _present_names(tensors: Mapping[str, Tensor], spec: BackboneSpec) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the names of today, without the parts that the model does not have."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        present = name
        for pattern, replacement in spec.renames:
            present = re.sub(pattern, replacement, present)
        renamed[present] = tensor
    kept = {name: tensor for name, tensor in renamed.items() if not has_prefix(name, spec.left_out)}
    return kept, [f"left out {', '.join(spec.left_out)}"] if len(kept) < len(renamed) else []


def _fit_position(tensors: dict[str, Tensor], expected: Mapping[str, Tensor], spec: BackboneSpec) -> list[str]:
    """Resize, in place, the file's square grid of learned positions to the model's; class tokens keep theirs.

    Bicubic, corners not aligned, as torchvision and timm do it (Dosovitskiy et al. 2021, section 3.2).
    """
    name = spec.position
    given = tensors.get(name) if name else None
    if name is None or given is None or given.ndim != 3 or not given.is_floating_point():
        return []
    wanted = expected[name]
    old, new = math.isqrt(given.shape[1]), math.isqrt(wanted.shape[1])
    num_tokens = given.shape[1] - old**2
    if given.shape == wanted.shape or given.shape[2] != wanted.shape[2] or num_tokens != wanted.shape[1] - new**2:
        return []
    grid = given[:, num_tokens:].to(wanted.dtype).transpose(1, 2).unflatten(2, (old, old))
    resized = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    tensors[name] = torch.cat([given[:, :num_tokens].to(wanted.dtype), resized.flatten(2).transpose(1, 2)], dim=1)
    return [f"positions interpolated from {old}x{old} to {new}x{new} patches"]


def _fit_first_conv(
    tensors: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    spec: BackboneSpec,
    rgb: Normalisation,
    grey: Normalisation,
) -> list[str]:
    """Turn the file's first convolution, in place, into the kind (grey or RGB) that the model has."""
    weight_name, offset_name = f"{spec.first_conv}.weight", f"{spec.first_conv}.offset"
    weight, offset = tensors.get(weight_name), tensors.get(offset_name)
    if weight is None or weight.ndim != 4 or not weight.is_floating_point():
        return []
    weight = weight.to(expected[weight_name].dtype)  # sums of fp16 weights would be rounded to fp16 again
    if offset_name in expected:
        if weight.shape[1] == 3 and offset is None:
            tensors[weight_name], tensors[offset_name] = grey_from_rgb(weight, rgb, grey)
            return ["first convolution turned from RGB to grey"]
        if weight.shape[1] == 1 and offset is None:
            tensors[offset_name] = torch.zeros_like(weight)
        return []
    if weight.shape[1] == 1 and (offset is None or offset.shape == weight.shape):
        offset = torch.zeros_like(weight) if offset is None else offset
        tensors[weight_name] = rgb_from_grey(weight, offset, rgb, grey)
        tensors.pop(offset_name, None)
        return ["first convolution turned from grey to RGB"]
    return []


def _fit_head(
    tensors: dict[str, Tensor], expected: Mapping[str, Tensor], spec: BackboneSpec, keep_head: bool
) -> list[str]:
    """Keep a head just like the model's; drop any other one and fill in the model's new head."""
    new_head = {name: tensor for name, tensor in expected.items() if has_prefix(name, [spec.head])}
    file_head = {name: tensor for name, tensor in tensors.items() if has_prefix(name, [spec.head])}
    num_outputs = new_head[f"{spec.head}.weight"].shape[0]
    if not file_head:
        tensors.update(new_head)
        return [f"new head with {num_outputs} outputs (the file has none)"]
    shapes = {name: list(tensor.shape) for name, tensor in file_head.items()}
    if keep_head and shapes == {name: list(tensor.shape) for name, tensor in new_head.items()}:
        return [f"head with {num_outputs} outputs from the file"]
    for name in file_head:
        del tensors[name]
    tensors.update(new_head)
    dropped = ", ".join(f"{name} {shapes[name]}" for name in sorted(shapes, reverse=True))
    return [f"new head with {num_outputs} outputs (dropped the file's: {dropped})"]


def _refuse_misfits(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], spec: BackboneSpec, path: Path | str
) -> None:
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    differing = [
        f"{name} {_shape(tensor)} instead of {_shape(expected[name])}"
        for name, tensor in tensors.items()
        if name in expected and _shape(tensor) != _shape(expected[name])
    ]
    if not (missing or unknown or differing):
        return
    parts = [
        f"{len(found)} {what} ({_some(found)})"
        for found, what in (
            (missing, "missing tensors"),
            (unknown, "unknown tensors"),
            (differing, "tensors of another shape"),
        )
        if found
    ]
    fitting = _backbone_of({name: tensor for name, tensor in tensors.items() if not has_prefix(name, [spec.head])})
    advice = (
        f"they are {fitting} weights: set model.backbone={fitting}"
        if fitting and fitting != spec.name
        else f"give weights with {_maker(spec)}'s tensor names for {spec.name}, or another model.backbone"
    )
    raise UserError(f"model.weights: {path} does not fit {spec.name}: {', '.join(parts)}; {advice}")


def _backbone_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The backbone whose tensors these are, heads and first convolutions aside."""

    def body(named: Mapping[str, Tensor], candidate: BackboneSpec) -> dict[str, torch.Size]:
        aside = [candidate.head, candidate.first_conv, *([candidate.position] if candidate.position else [])]
        names = [name for name in named if not has_prefix(name, aside) and not name.endswith("num_batches_tracked")]
        return {name: named[name].shape for name in names}

    for name in registry.names():
        candidate = registry.spec(name)
        given, _ = _present_names(tensors, candidate)
        # Only a family whose stages the file has is worth building: all of them would take seconds.
        if not all(any(has_prefix(one, stage) for one in given) for stage in candidate.stages):
            continue
        with torch.device("meta"):
            shapes = candidate.build().state_dict()
        if body(shapes, candidate) == body(given, candidate):
            return name
    return None


def _maker(spec: BackboneSpec) -> str:
    return "timm" if spec.name.startswith(registry.TIMM) else "torchvision"


def _shape(tensor: Tensor) -> str:
    kind = "" if tensor.dtype in _REAL else f"{str(tensor.dtype).removeprefix('torch.')} "
    return f"{kind}{list(tensor.shape)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (", …" if len(names) > _NUM_NAMED else "")
