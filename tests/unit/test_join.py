"""Two networks as one: shapes, what moves, what is frozen, where weights come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from store_on_disk import stored_in
from tiny_backbone import tiny_registered
from torch import Tensor

from medtl_dist.errors import UserError
from medtl_dist.models.backbones import Created, create_model
from medtl_dist.models.freezing import freeze, frozen_names
from medtl_dist.models.join import create_network_of, spec_of
from medtl_dist.models.registry import has_prefix, native_normalisation, spec
from medtl_dist.run import Folder
from medtl_dist.sections import Model
from medtl_dist.train import checkpoint
from medtl_dist.train.ema import ema_of


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny_registered():
        yield


_PAIRS = [("concat", "tiny", "resnet18"), ("serial", "tiny", "resnet18"), ("serial", "resnet18", "tiny")]


def _model(join: str, first: str, second: str, **keys: str | bool) -> Model:
    return Model.model_validate(
        {"join": join, "backbone": first, "second_backbone": second, "weights": "random", "second_weights": "random"}
        | keys
    )


def _create(model: Model, channels: int = 1, outputs: int = 2, seed: int = 0) -> Created:
    norm = native_normalisation(spec(model.backbone), channels)
    return create_network_of(
        model, num_outputs=outputs, in_channels=channels, normalisation=norm, image_size_px=64, seed=seed
    )


def _images(channels: int = 1) -> Tensor:
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("join", "first", "second"), _PAIRS)
def test_every_parameter_learns_and_every_tensor_has_its_stage(join: str, first: str, second: str) -> None:
    created = _create(_model(join, first, second))
    model = created.model
    logits = model.eval()(_images())
    assert logits.shape == (2, 2)
    logits[:, 1].sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # else DDP would wait for ever
    places = [name for stage in created.spec.stages for name in stage] + [created.spec.head]
    assert all(sum(has_prefix(name, [place]) for place in places) == 1 for name in model.state_dict())
    again = ema_of(model, 0.9).model.eval()
    assert torch.equal(again(_images()), logits.detach())


@pytest.mark.parametrize(("join", "first", "second"), _PAIRS)
def test_frozen_from_the_input_on_and_what_is_frozen_stays(join: str, first: str, second: str) -> None:
    created = _create(_model(join, first, second))
    model, joined = created.model, created.spec
    for depth in (1, joined.num_stages - 1, joined.num_stages):
        freeze(model, joined, depth)
        frozen = [name for stage in joined.stages[:depth] for name in stage]
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.train()
        model(_images()).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == has_prefix(name, frozen), name
        for name, tensor in model.state_dict().items():
            if has_prefix(name, frozen):
                assert torch.equal(tensor, before[name]), name
        model.zero_grad(set_to_none=True)
    assert all(has_prefix(name, [joined.head]) for name, p in model.named_parameters() if p.requires_grad)
    if join == "concat":  # a depth freezes both from the input on
        assert {name.partition(".")[0] for name in joined.stages[0]} == {"first", "second"}


def test_each_half_has_its_own_weights_and_concat_computes_what_both_would(tmp_path: Path) -> None:
    files = {}
    halves = {}
    for name, seed in (("tiny", 7), ("resnet18", 8)):
        norm = native_normalisation(spec(name), 1)
        half = create_model(
            name, num_outputs=3, in_channels=1, weights="random", normalisation=norm, image_size_px=64, seed=seed
        ).model
        save_file(half.state_dict(), tmp_path / f"{name}.safetensors")
        files[name] = str(tmp_path / f"{name}.safetensors")
        half.set_submodule(spec(name).head, torch.nn.Identity())
        halves[name] = half.eval()
    weights = {"weights": files["tiny"], "second_weights": files["resnet18"]}
    model = _create(_model("concat", "tiny", "resnet18", **weights)).model.eval()
    features = torch.cat([halves["tiny"](_images()), halves["resnet18"](_images())], dim=1)
    assert torch.equal(model(_images()), model.get_submodule("head")(features))
    serial = _create(_model("serial", "tiny", "resnet18", **weights)).model.eval()
    maps = halves["tiny"].get_submodule("layer4")(_before_layer4(halves["tiny"])(_images()))
    assert torch.equal(serial.get_submodule("first")(_images()), maps)
    second = halves["resnet18"].state_dict()
    name = "layer1.0.conv1.weight"
    assert torch.equal(serial.state_dict()[f"second.{name}"], second[name])


def _before_layer4(tiny: torch.nn.Module) -> torch.nn.Module:
    names = ("conv1", "bn1", "layer1", "layer2", "layer3")
    return torch.nn.Sequential(*(tiny.get_submodule(name) for name in names))


def test_alexnet_ends_with_its_features_in_a_series() -> None:
    joined = spec_of(_model("serial", "alexnet", "resnet101"))
    assert [stage[0] for stage in joined.stages[:6]] == [*(f"first.features.{n}" for n in (0, 3, 6, 8, 10)), "adapter"]
    assert (joined.num_stages, joined.head, joined.feature_dim) == (11, "second.fc", 2048)


@pytest.mark.parametrize(("join", "first", "second"), _PAIRS[:2])
def test_a_saved_pair_is_taken_whole(join: str, first: str, second: str, tmp_path: Path) -> None:
    made = _create(_model(join, first, second), seed=3)
    path = tmp_path / "pair.safetensors"
    save_file(made.model.state_dict(), path)
    same = _create(_model(join, first, second, weights=str(path)))
    assert torch.equal(same.model.eval()(_images()), made.model.eval()(_images()))
    assert same.message.endswith("head from the file")
    for other in (
        _create(_model(join, first, second, weights=str(path), keep_head=False)),
        _create(_model(join, first, second, weights=str(path)), outputs=3),
    ):
        own, theirs = other.model.state_dict(), made.model.state_dict()
        differing = [name for name in own if not torch.equal(own[name], theirs[name])]
        assert differing
        assert all(has_prefix(name, [made.spec.head]) for name in differing)
    with pytest.raises(UserError, match="holds two joined networks that are not"):
        _create(_model(join, first, "tiny_dropout", weights=str(path)))


@pytest.mark.parametrize(("join", "first", "second"), _PAIRS[:2])
def test_a_checkpoint_of_a_pair_is_taken_whole_though_what_was_frozen_lies_apart(
    join: str, first: str, second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen to the adapter a serial pair has nothing of its first network in the file of what learns."""
    stored_in(tmp_path, monkeypatch)
    made = _create(_model(join, first, second), seed=3)
    weights = made.model.state_dict()
    frozen = frozen_names(weights, made.spec, 6 if join == "serial" else 2)
    run = tmp_path / "bucket" / "run"
    checkpoint.save(Folder.local(run), 10, weights=weights, state={}, meta={}, frozen=frozen)
    name = "checkpoints/00000010/model.safetensors"
    assert load_file(run / name).keys() == weights.keys() - frozen
    for place in (str(run / name), f"s3://bucket/run/{name}"):
        same = _create(_model(join, first, second, weights=place)).model.state_dict()
        assert all(torch.equal(same[key], tensor) for key, tensor in weights.items())


def test_what_cannot_be_joined_is_told() -> None:
    with pytest.raises(UserError, match="different normalisations"):
        spec_of(_model("concat", "resnet18", "inception_v3"))
    with pytest.raises(UserError, match="vit_b_16 has no feature map"):
        spec_of(_model("serial", "vit_b_16", "resnet18"))
    with pytest.raises(ValueError, match="go together"):
        Model.model_validate({"join": "concat"})
