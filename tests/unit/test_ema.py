from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medtl_dist.config import load_config
from medtl_dist.errors import ConfigError
from medtl_dist.train.ema import ema_of, update


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def _drift(model: nn.Module, generator: torch.Generator) -> None:
    """Every floating tensor somewhere else, the counter one on."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        else:
            tensor.add_(1)


@settings(deadline=None, max_examples=20)
@given(decay=st.floats(0.01, 0.9999), steps=st.integers(1, 12), seed=st.integers(0, 9))
def test_the_average_is_the_normalised_weighted_sum_of_what_it_saw(decay: float, steps: int, seed: int) -> None:
    model, generator = _model(), torch.Generator().manual_seed(seed)
    ema = ema_of(model, decay)
    seen: list[dict[str, np.ndarray]] = []
    for _ in range(steps):
        _drift(model, generator)
        update(ema, model)
        seen.append({name: tensor.double().numpy().copy() for name, tensor in model.state_dict().items()})
    factors = np.array([decay ** (steps - 1 - i) for i in range(steps)])
    for name, tensor in ema.model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert int(tensor) == steps
            continue
        expected = sum(f * state[name] for f, state in zip(factors / factors.sum(), seen, strict=True))
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_one_update_is_the_weights_themselves_and_what_stays_stays_to_the_bit() -> None:
    model, generator = _model(), torch.Generator().manual_seed(1)
    ema = ema_of(model, 0.999)
    _drift(model, generator)
    update(ema, model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in ema.model.state_dict().items())
    frozen = model.get_parameter("0.weight").detach().clone()
    for _ in range(50):
        model.get_parameter("1.weight").data.add_(torch.randn(2, generator=generator))
        update(ema, model)
    assert torch.equal(ema.model.state_dict()["0.weight"], frozen)
    assert not torch.equal(ema.model.state_dict()["1.weight"], model.get_parameter("1.weight"))


def test_the_average_is_apart_from_the_model() -> None:
    model = _model()
    ema = ema_of(model, 0.5)
    before = ema.model.state_dict()["0.weight"].clone()
    model.get_parameter("0.weight").data.add_(1)
    assert torch.equal(ema.model.state_dict()["0.weight"], before)
    model(torch.ones(2, 1, 4, 4)).sum().backward()
    assert all(parameter.grad is None for parameter in ema.model.parameters())


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_outside_0_and_1_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"train\.ema_decay"):
        load_config(overrides=[f"train.ema_decay={decay}"])
