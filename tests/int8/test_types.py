"""What int8 and fp8 are both held to: errors of networks, and what says whether an executor computes them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel_parnet import Config, Engine, fold, quantize
from parallel_parnet.executors.segment import SegmentModule
from parallel_parnet.int8.agreement import Agreement, agreement
from parallel_parnet.int8.errors import errors
from parallel_parnet.program.contract import E4M3
from small import SMALL, Golden, golden_cases, lively, relative

INT8 = torch.int8
EXACT = fold(lively(SMALL, 6))
PICTURES = torch.randn(16, 3, 64, 64)
PROGRAMS = {to: quantize(EXACT, PICTURES, to=to) for to in (INT8, E4M3)}
# the golden networks' few channels are 3e-2 to 1.1e-1 off in fp8, by chance: wrong ones are further away
GOLDEN_OFF = {INT8: (1e-3, 0.05), E4M3: (1e-2, 0.15)}
MOST_OFF = {INT8: 0.35, E4M3: 0.5}
each_type = pytest.mark.parametrize("to", PROGRAMS, ids=str)


@each_type
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("planes", [(8, 16, 32, 64), (16, 20, 24), (12, 40), (8, 16, 24, 32, 40)])
def test_random_networks(planes: tuple[int, ...], activation: str, to: torch.dtype) -> None:
    """Close to fp32, closer where less of it is narrow; and just what can be narrow is."""
    config = Config(planes, (2,) * (len(planes) - 1), num_classes=10, activation=activation)
    exact = fold(lively(config, random.randrange(100)))
    x, other = torch.randn(2, 32, 3, exact.size_multiple, exact.size_multiple)
    program = quantize(exact, x, to=to)
    narrow = [op.name for op in exact.operations if program.weights[f"{op.name}.weight"].dtype == to]
    assert narrow == [op.name for op in exact.operations if op.kind == "conv" and op.inputs != ("input",)]
    last = quantize(exact, x, narrow[:-1], to)
    assert {name for name, t in last.weights.items() if t.dtype == to} == {f"{narrow[-1]}.weight"}
    assert len([name for name in last.weights if name.endswith(".step")]) == len(last.by_name[narrow[-1]].inputs)
    off = errors({"all": program, "last": last}, exact, other)
    assert off["last"] < off["all"] < MOST_OFF[to]


@each_type
@pytest.mark.parametrize("golden", golden_cases(), ids=str)
def test_golden_networks(golden: Golden, to: torch.dtype) -> None:
    """The released code's answers: ranges from pictures of the same kind."""
    program = quantize(golden.program, torch.randn(16, *golden.input.shape[1:]), to=to)
    least, most = GOLDEN_OFF[to]
    assert least < relative(Engine(program, device="cpu", executor="eager")(golden.input), golden.logits) < most


@each_type
def test_right_executors_agree(to: torch.dtype) -> None:
    found = agreement(PROGRAMS[to], "eager", torch.randn(4, 3, 64, 64))
    assert found.right and found.values > 10_000


@each_type
def test_a_tie_in_every_pixel_is_no_difference(to: torch.dtype) -> None:
    """Where all pixels are alike, so are many values, and they are rounded alike."""
    for level in torch.linspace(-2, 2, 12):
        assert agreement(PROGRAMS[to], "eager", level.expand(1, 3, 64, 64)).right, level


def test_what_agreement_bears() -> None:
    assert Agreement(1, 26, 10_001, 1e-6).right and "26 of 10001" in str(Agreement(1, 26, 10_001, 1e-6))
    for wrong in (Agreement(2, 26, 100_000, 0), Agreement(1, 27, 10_000, 0), Agreement(0, 0, 10_000, 1e-4)):
        assert not wrong.right


CHANGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a channel": lambda w: w["weight"][:, 0].zero_(),
    "its steps": lambda w: w.update(weight_step=w["weight_step"].roll(1, 1)),
    "its rows": lambda w: w["weight"].mul_(torch.linspace(0.9, 1.1, len(w["weight"])).view(-1, 1, 1, 1)),
    "unrounded": lambda w: w.pop("step"),
    "zero": lambda w: w.update(zero=0 * w["zero"]),
    "another step": lambda w: w.update(step=1.5 * w["step"]),
}


class Wrong(SegmentModule):
    """A segment as an executor might compute it that is wrong in one operation."""

    operation, change = "", ""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for op, weights in self.operations:
            if op.name == self.operation:
                CHANGES[self.change](weights)


@pytest.mark.parametrize(
    ("to", "operation", "change"),
    [
        (INT8, "streams.1.2", "a channel"), (INT8, "streams.2.0", "its steps"), (INT8, "streams.0.1", "unrounded"),
        (INT8, "inits.0.1", "zero"), (INT8, "inits.0.0", "unrounded"), (INT8, "combine.3", "a channel"),
        (E4M3, "streams.1.2", "a channel"), (E4M3, "streams.2.0", "its rows"), (E4M3, "streams.0.1", "unrounded"),
        (E4M3, "combine.2", "another step"), (E4M3, "inits.0.0", "unrounded"), (E4M3, "combine.3", "a channel"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_executor_is_found(
    to: torch.dtype, operation: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel_parnet.executors.torch_backend.SegmentModule", Wrong)
    monkeypatch.setattr(Wrong, "operation", operation)
    monkeypatch.setattr(Wrong, "change", change)
    assert not agreement(PROGRAMS[to], "eager", torch.randn(4, 3, 64, 64)).right
