from __future__ import annotations

import builtins
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from medtl_dist.errors import UserError
from medtl_dist.models.backbones import create_model, native_normalisation
from medtl_dist.models.freezing import resolve_depth
from medtl_dist.models.registry import spec
from medtl_dist.models.spec import BackboneSpec, has_prefix
from medtl_dist.models.split import split
from medtl_dist.models.timm_models import timm_spec

pytest.importorskip("timm", reason="timm is not installed")


@pytest.mark.parametrize(
    ("name", "num_stages", "first", "last", "feature_dim"),
    [
        ("resnet18", 5, ("conv1", "bn1"), ("layer4",), 512),
        ("tf_efficientnet_lite0", 8, ("conv_stem", "bn1"), ("blocks.6", "conv_head", "bn2"), 1280),
        (
            "vit_tiny_patch16_224.augreg_in21k",
            13,
            ("cls_token", "pos_embed", "patch_embed"),
            ("blocks.11", "norm"),
            192,
        ),
        ("convnext_atto", 5, ("stem",), ("stages.3", "head.norm"), 320),
        ("swin_tiny_patch4_window7_224", 5, ("patch_embed",), ("layers.3", "norm"), 768),
        ("mobilenetv3_small_100", 8, ("conv_stem", "bn1"), ("conv_head",), 1024),
    ],
)
def test_stages_are_timms_grouping(
    name: str, num_stages: int, first: tuple[str, ...], last: tuple[str, ...], feature_dim: int
) -> None:
    backbone = spec(f"timm/{name}")
    assert (backbone.num_stages, backbone.stages[0], backbone.stages[-1]) == (num_stages, first, last)
    assert backbone.feature_dim == feature_dim
    with torch.device("meta"):
        model = backbone.build_for(None)
    parts = [*backbone.stages, (backbone.head,)]
    assert all(sum(has_prefix(tensor, part) for part in parts) == 1 for tensor in model.state_dict())
    again = pickle.loads(pickle.dumps(backbone))  # noqa: S301  (made here)
    assert (again.name, again.stages) == (backbone.name, backbone.stages)


def test_a_model_that_cannot_be_cut_freezes_all_or_nothing() -> None:
    backbone = spec("timm/xcit_nano_12_p16_224")
    assert backbone.num_stages == 1
    assert [resolve_depth(backbone, depth) for depth in (0, "all")] == [0, 1]
    with pytest.raises(UserError, match=r'2 is not a depth of timm/xcit.*could not be told apart; give 0 .* or "all"'):
        resolve_depth(backbone, 2)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnet19", r"timm has no model 'resnet19'; did you mean timm/resnet18"),
        ("hf-hub:somebody/something", r"timm has no model 'hf-hub:somebody/something'"),
        ("vit_tiny_patch16_224.nope", r"can't be built: Invalid pretrained tag"),
        ("deit_tiny_distilled_patch16_224", r"does not end in one linear head \(\('head', 'head_dist'\)\)"),
        ("fastvit_t8", r"does not begin with one convolution"),
    ],
)
def test_models_that_do_not_fit_are_one_clear_line(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        spec(f"timm/{name}")
    assert "\n" not in caught.value.message


def test_a_convolution_that_grey_images_would_get_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_meta(backbone: BackboneSpec, *_: Any) -> nn.Module:
        with torch.device("meta"):
            return backbone.build()

    monkeypatch.setattr("medtl_dist.models.backbones._random_model", on_meta)
    grey = native_normalisation(spec("timm/nfnet_f0"), 1)
    with pytest.raises(UserError, match=r"timm/nfnet_f0 can't take grey images .*ScaledStdConv2d.*--color rgb"):
        create_model("timm/nfnet_f0", num_outputs=2, in_channels=1, weights="random", normalisation=grey, seed=0)


def test_without_timm_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "timm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    timm_spec.cache_clear()
    with pytest.raises(UserError, match=r"needs timm, which is not installed: pip install 'medtl_dist\[timm\]'"):
        spec("timm/resnet18")


def test_a_transformer_is_built_for_the_images_it_gets() -> None:
    backbone = spec("timm/vit_tiny_patch16_224")
    assert (backbone.patch_px, backbone.position) == (16, "pos_embed")
    with torch.device("meta"):
        model = backbone.build_for(64)
        boundary = split(model, backbone, 3).prefix(torch.zeros(1, 3, 64, 64))
    assert boundary.shape == (1, 17, 192)
