"""Folding against the training form, for every shape of network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel

from parallel_parnet import Config, Engine, ParNetBlock, ParNetError, fold, save_checkpoint
from small import SMALL, lively, relative


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
    assert difference < 1e-4 * (expected.norm() + model.head.fc.bias.norm())


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


PARTS: list[tuple[Callable[[ParNetBlock], object], str]] = [
    (
        lambda b: setattr(b.block.rbr_dense, "conv", torch.nn.Conv2d(8, 8, 3, padding=1)),
        r"conv is Conv2d\(.*bias=False",
    ),
    (lambda b: b.block.se.cvsig.update({"conv": torch.nn.Conv2d(8, 8, 1)}), r"conv is Conv2d\(.*bias=False"),
    (lambda b: setattr(b.block.rbr_dense, "bn", torch.nn.Identity()), r"^Identity\(\): only batch norms"),
    (lambda b: setattr(b.block, "rbr_identity", torch.nn.BatchNorm2d(8, affine=False)), "^BatchNorm2d.*batch norms"),
    (lambda b: setattr(b.block.pointwise, "bn", torch.nn.BatchNorm2d(8, track_running_stats=False)), "^BatchNorm2d"),
]


@pytest.mark.parametrize(("change", "message"), PARTS)
def test_blocks_with_foreign_parts_are_refused(change: Callable[[ParNetBlock], object], message: str) -> None:
    """A bias, where another library has fused a batch norm, would be lost without a word."""
    model = lively(SMALL, 0)
    block = model.streams[0][1]  # type: ignore[index]
    change(block)
    for fold_it in (block.fold, lambda: fold(model)):
        with pytest.raises(ParNetError, match=message):
            fold_it()


def test_models_that_are_none_are_refused() -> None:
    model = lively(SMALL, 0)
    for other in (torch.nn.Linear(1, 1), fold(model), None):
        with pytest.raises(ParNetError, match=f"^fold takes a ParNet .* this is a {type(other).__name__}$"):
            fold(other)  # type: ignore[arg-type]
    for wrapped in (torch.nn.DataParallel(model), AveragedModel(model), torch.compile(AveragedModel(model))):
        with pytest.raises(ParNetError, match=r"^fold takes a ParNet .* this is a \w+: give its \.module$"):
            fold(wrapped)  # type: ignore[arg-type]
    assert fold(torch.compile(model)).digest == fold(model).digest
    with pytest.raises(ParNetError, match=r"^save_checkpoint takes a .* OptimizedModule: give its \._orig_mod$"):
        save_checkpoint(torch.compile(model), "a.safetensors")  # type: ignore[arg-type]
    model.streams[0].append(torch.nn.Dropout())  # type: ignore[operator, union-attr]
    with pytest.raises(ParNetError, match=r"^streams\.0 is Sequential\(ParNetBlock, .*Dropout\), where"):
        fold(model)


@torch.no_grad()
def test_a_classifier_without_bias() -> None:
    model, x = lively(SMALL, 0), torch.randn(2, 3, 32, 32)
    model.head["fc"] = torch.nn.Linear(64, 10, bias=False)
    assert relative(Engine(fold(model), executor="reference")(x), model(x)) < 1e-5
