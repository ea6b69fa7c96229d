"""The weights that a checkpoint's folder holds, all of them, whatever was frozen."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def weights_in(place: Path) -> dict[str, Tensor]:
    frozen = place / "frozen.safetensors"
    return load_file(place / "model.safetensors") | (load_file(frozen) if frozen.exists() else {})
