from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medtl_dist.models.freezing import freeze
from medtl_dist.models.registry import spec
from medtl_dist.sections import Optim, Schedule
from medtl_dist.train.optim import (
    create_optimizer,
    lr_factor,
    parameter_groups,
    set_lr,
)


def _factors(schedule: Schedule, steps_per_epoch: int, epochs: int) -> list[float]:
    return [
        lr_factor(schedule, step=s, steps_per_epoch=steps_per_epoch, epochs=epochs)
        for s in range(steps_per_epoch * epochs)
    ]


@settings(deadline=None, max_examples=30)
@given(steps=st.integers(1, 7), epochs=st.integers(1, 9), warmup=st.floats(0, 3))
def test_cosine_is_torchs_after_warm_up(steps: int, epochs: int, warmup: float) -> None:
    factors = _factors(Schedule(name="cosine", warmup_epochs=warmup, final_fraction=0.1), steps, epochs)
    num_warm = min(round(warmup * steps), steps * epochs)
    assert factors[:num_warm] == pytest.approx([(s + 1) / num_warm for s in range(num_warm)])
    rest = steps * epochs - num_warm
    if rest:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=rest, eta_min=0.1)
        expected = []
        for _ in range(rest):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            reference.step()
        assert factors[num_warm:] == pytest.approx(expected, abs=1e-9)


def test_step_drops_at_whole_epochs_as_torch_does() -> None:
    factors = _factors(Schedule(name="step", step_epochs=3, gamma=0.1), 4, 10)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
    for epoch in range(10):
        assert factors[4 * epoch : 4 * epoch + 4] == pytest.approx([optimizer.param_groups[0]["lr"]] * 4)
        optimizer.step()
        reference.step()


def test_constant_is_one_after_warm_up() -> None:
    assert _factors(Schedule(name="constant", warmup_epochs=0.5), 4, 2) == [0.5, 1, 1, 1, 1, 1, 1, 1]


def _resnet(frozen_depth: int = 0) -> nn.Module:
    model = spec("resnet18").build()
    freeze(model, spec("resnet18"), frozen_depth)
    return model


def _settings(config: Optim, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Peak learning rate and weight decay by parameter name; every trainable parameter once."""
    found: dict[str, tuple[float, float]] = {}
    for group in parameter_groups(config, model, spec("resnet18")):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is model.get_parameter(name)
            assert name not in found
            found[name] = group["peak_lr"], group["weight_decay"]
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_head_and_backbone_keep_their_own_peaks(name: Literal["sgd", "adamw"]) -> None:
    config = Optim(name=name, lr=0.2, backbone_lr=0.05, weight_decay=0.3)
    groups = parameter_groups(config, _resnet(), spec("resnet18"))
    # The two groups of old, in the order of old: a clipped norm is summed in this order.
    assert groups[0]["names"] == ["fc.weight", "fc.bias"]
    assert groups[1]["names"] == [name for name, _ in _resnet().named_parameters()][:-2]
    optimizer = create_optimizer(config, groups)
    set_lr(optimizer, 0.5)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.3), (0.025, 0.3)]
    assert len(parameter_groups(config, _resnet(5), spec("resnet18"))) == 1
    assert {rate for rate, _ in _settings(Optim(lr=0.3), _resnet()).values()} == {0.3}


def test_layer_decay_is_a_power_per_stage_from_the_head_down() -> None:
    config = Optim(lr=1.0, backbone_lr=0.5, layer_decay=0.1)
    rates = {name: rate for name, (rate, _) in _settings(config, _resnet(2)).items()}
    expected = {
        "fc.weight": 1.0,
        "layer4.0.conv1.weight": 0.05,
        "layer3.1.bn2.bias": 0.005,
        "layer2.0.bn1.weight": 5e-4,
    }
    assert {name: rates[name] for name in expected} == pytest.approx(expected)
    assert not any(name.startswith(("conv1", "bn1", "layer1")) for name in rates)
    assert _settings(config, _resnet())["conv1.weight"][0] == pytest.approx(0.5 * 0.1**5)
    assert all(
        {rates[other] for other in rates if other.split(".")[0] == stage} == {rates[f"{stage}.0.conv1.weight"]}
        for stage in ("layer2", "layer3", "layer4")
    )


def test_norms_and_biases_are_left_out_of_weight_decay_where_asked() -> None:
    config = Optim(weight_decay=0.1, decay_norms_and_biases=False, layer_decay=0.5)
    model = _resnet()
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, (_, weight_decay) in _settings(config, model).items():
        exempt = name.endswith(".bias") or name.rpartition(".")[0] in norms
        assert weight_decay == (0.0 if exempt else 0.1), name


def test_a_decoupled_step_with_a_zero_gradient_is_the_closed_form_of_each_group() -> None:
    """AdamW without a gradient only decays: θ · (1 - lr · factor · decay)."""
    model = _resnet()
    config = Optim(lr=0.1, layer_decay=0.5, weight_decay=0.2, decay_norms_and_biases=False)
    optimizer = create_optimizer(config, parameter_groups(config, model, spec("resnet18")))
    set_lr(optimizer, 0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, share in {"fc.weight": 1.0, "layer4.1.conv2.weight": 0.5, "conv1.weight": 0.5**5}.items():
        shrink = 1 - 0.1 * 0.5 * share * 0.2
        torch.testing.assert_close(model.get_parameter(name), before[name] * shrink, rtol=1e-6, atol=0)
    for name in ("bn1.weight", "fc.bias"):
        assert torch.equal(model.get_parameter(name), before[name])
