"""Folding against the training form, for every shape of network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SMALL, lively, relative
from parallel_parnet import Config, Engine, fold


@st.composite
def configs(draw: st.DrawFn) -> Config:
    streams = draw(st.integers(1, 4))
    widths = st.integers(1, 6).map(lambda n: 4 * n)
    return Config(
        planes=(*(draw(widths) for _ in range(streams)), draw(st.integers(1, 40))),
        blocks=tuple(draw(st.integers(1, 3)) for _ in range(streams)),
        num_classes=draw(st.integers(1, 12)),
        activation=draw(st.sampled_from(["silu", "relu"])),
        stem_strides=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
    )


@settings(max_examples=25, deadline=None)
@given(config=configs(), seed=st.integers(0, 2**31), n=st.integers(1, 3), h=st.integers(1, 2), w=st.integers(1, 2))
def test_any_network(config: Config, seed: int, n: int, h: int, w: int) -> None:
    model = lively(config, seed)
    program = fold(model)
    m = program.size_multiple
    x = torch.randn(n, 3, h * m, w * m)
    with torch.no_grad():
        expected = model(x)
    difference = (Engine(program, executor="reference")(x) - expected).norm()
    # a single logit may come out near 0, where the bias cancels the rest: rounding is relative to either
    assert difference < 1e-5 * (expected.norm() + model.head.fc.bias.norm())


def test_the_model_is_left_as_it_is() -> None:
    model = lively(SMALL, 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fold(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("weight", ["border", "gate_bias", "scale", "shift", "gate_weight"])
def test_every_kind_of_weight_matters(weight: str) -> None:
    """Without any one of them, answers differ by far more than the tolerance: none is tested in vain."""
    model = lively(SMALL, 1)
    program = fold(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    for name, tensor in program.weights.items():
        if name.endswith("." + weight):
            tensor.zero_()
    assert relative(Engine(program, executor="reference")(x), expected) > 1e-3
