from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medtl_dist.errors import UserError
from medtl_dist.models.backbones import create_model, native_normalisation, spec
from medtl_dist.models.freezing import (
    count_parameters,
    freeze,
    frozen_parameter_names,
    resolve_depth,
    trainable_groups,
)
from medtl_dist.models.spec import has_prefix

R18 = spec("resnet18")
DEPTHS = [0, 1, 2, 3, 4, 5]


def new_model(backbone: str = "resnet18", in_channels: int = 1) -> nn.Module:
    return create_model(
        backbone,
        num_outputs=3,
        in_channels=in_channels,
        weights="random",
        normalisation=native_normalisation(spec(backbone), in_channels),
        seed=0,
    ).model


def sgd_step(model: nn.Module, in_channels: int = 1) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn((4, in_channels, 32, 32), generator=generator)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(learning, lr=0.5)
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
    optimiser.step()
    optimiser.zero_grad()


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def tensors_of(model: nn.Module, prefixes: list[str]) -> set[str]:
    return {name for name in model.state_dict() if has_prefix(name, prefixes)}


def stages(backbone: str, depth: int) -> list[str]:
    return [prefix for stage in spec(backbone).stages[:depth] for prefix in stage]


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("backbone", "depth", "in_channels"),
    [("resnet18", depth, 1) for depth in DEPTHS] + [("resnet50", 0, 3), ("resnet50", 3, 3), ("resnet50", 5, 3)],
)
def test_only_what_should_move_moves(backbone: str, depth: int, in_channels: int) -> None:
    model = new_model(backbone, in_channels)
    freeze(model, spec(backbone), depth)
    model.train()
    before = snapshot(model)
    sgd_step(model, in_channels)
    # Parameters and BatchNorm's buffers alike: all of the trained part, nothing of the frozen one.
    assert moved(model, before) == set(before) - tensors_of(model, stages(backbone, depth))


@pytest.mark.parametrize("name", ["resnet18", "resnet101"])  # all others: test_architectures.py
@pytest.mark.parametrize("depth", DEPTHS)
def test_frozen_parameters_are_those_of_the_first_stages(name: str, depth: int) -> None:
    with torch.device("meta"):
        model = spec(name).build()
    freeze(model, spec(name), depth)
    frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == frozen_parameter_names(model, spec(name), depth)
    assert set(frozen) == {key for key, _ in model.named_parameters() if has_prefix(key, stages(name, depth))}
    for key, module in model.named_modules():
        assert module.training == (not has_prefix(key, stages(name, depth))), key


def test_stays_in_eval_whoever_calls_train() -> None:
    model = new_model()
    freeze(model, R18, 3)
    frozen = [module for name, module in model.named_modules() if has_prefix(name, stages("resnet18", 3))]
    assert len(frozen) > 20
    for call in (model.train, model.get_submodule("layer1").train, model.get_submodule("bn1").train):
        call()
        assert not any(module.training for module in frozen)
    for module in model.modules():
        module.train()
    assert not any(module.training for module in frozen)
    assert model.training
    assert model.get_submodule("layer4.0.bn1").training
    model.eval()
    assert not any(module.training for module in model.modules())


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # noqa: S301  (made here)


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_are_frozen_too_and_independent(duplicate) -> None:
    model = new_model()
    freeze(model, R18, 2)
    twin = duplicate(model)
    twin.train()
    before, before_twin = snapshot(model), snapshot(twin)
    sgd_step(twin)
    assert moved(twin, before_twin) == set(before) - tensors_of(model, stages("resnet18", 2))
    assert moved(model, before) == set()
    freeze(twin, R18, 0)  # the copy's switch turns the copy's modules, not the original's
    assert twin.get_submodule("bn1").training
    assert not model.get_submodule("bn1").training


@pytest.mark.usefixtures("one_process_group")
def test_stays_frozen_inside_ddp() -> None:
    model = new_model()
    freeze(model, R18, 2)
    wrapped = DistributedDataParallel(model)
    wrapped.train()
    before = snapshot(model)
    sgd_step(wrapped)
    assert moved(model, before) == set(before) - tensors_of(model, stages("resnet18", 2))


def test_freezing_again_replaces_the_depth_and_keeps_the_mode() -> None:
    model = new_model()
    freeze(model, R18, 5)
    freeze(model, R18, 1)
    assert model.get_submodule("layer1.0.bn1").training
    assert not model.get_submodule("bn1").training
    assert model.get_parameter("layer1.0.conv1.weight").requires_grad
    model.eval()
    freeze(model, R18, 0)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all("train" not in vars(module) for module in model.modules())


def test_nothing_below_the_frozen_depth_is_in_the_graph() -> None:
    model = new_model()
    freeze(model, R18, 3)
    in_graph: list[bool] = []

    def note(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        in_graph.append(output.requires_grad)

    for name in ("layer2", "layer3"):
        model.get_submodule(name).register_forward_hook(note)
    model(torch.zeros(2, 1, 32, 32))
    assert in_graph == [False, True]


@pytest.mark.parametrize("depth", DEPTHS)
def test_saved_weights_load_into_a_model_of_any_depth(depth: int, tmp_path: Path) -> None:
    model = new_model()
    names_before = list(model.state_dict())
    freeze(model, R18, depth)
    assert list(model.state_dict()) == names_before
    model.train()
    sgd_step(model)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    fresh = new_model()
    freeze(fresh, R18, 5 - depth)
    fresh.load_state_dict(load_file(tmp_path / "w.safetensors"))
    (tmp_path / "w.safetensors").unlink()
    images = torch.ones(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), fresh.eval()(images))


@pytest.mark.parametrize("depth", DEPTHS)
def test_groups_hold_every_learning_parameter_once(depth: int) -> None:
    with torch.device("meta"):
        model = R18.build()
    freeze(model, R18, depth)
    groups = trainable_groups(model, R18)
    assert set(groups["head"]) == {"fc.weight", "fc.bias"}
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(groups["backbone"]) == learning - {"fc.weight", "fc.bias"}
    assert (depth == 5) == (not groups["backbone"])
    assert all(group[name] is model.get_parameter(name) for group in groups.values() for name in group)


def test_parameters_are_counted() -> None:
    with torch.device("meta"):
        model = R18.build()
    assert count_parameters(model) == (11_689_512, 11_689_512)  # torchvision's published number
    freeze(model, R18, "all")
    assert count_parameters(model) == (11_689_512, 512 * 1000 + 1000)


def test_all_means_every_stage() -> None:
    assert resolve_depth(R18, "all") == 5
    assert resolve_depth(R18, 0) == 0


@pytest.mark.parametrize("depth", [-1, 6, "half", 2.0, True])
def test_an_impossible_depth_teaches_the_stages(depth) -> None:
    with pytest.raises(
        UserError, match=r"not a depth of resnet18; give 0 .* to 5 or \"all\".* 1 = conv1 \+ bn1, 2 = layer1"
    ):
        freeze(new_model(), R18, depth)
