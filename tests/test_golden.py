"""The released code's own answers, in training form, folded, and by every executor."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from parallel_parnet import Config, Engine, Placement, fold, load_checkpoint
from parallel_parnet.parity import LIMIT, tolerance
from parallel_parnet.parity import relative as of_package
from small import OPTIONAL, Golden, golden_cases, lively, relative

CASES = golden_cases()
DTYPES = (torch.float32, torch.bfloat16)
# Three roundings a level (weights, what leaves a convolution, what is stored) of 1.6e-3 each, root mean square, make
# 9e-3 of the logits over 11 levels. Who rounds more, as OpenVINO does averages and gates, is held to torch's own error.
BY_TORCH = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def limit(golden: Golden, executor: str, dtype: torch.dtype) -> float:
    if executor in ("reference", "eager"):
        return BY_TORCH[dtype]
    torchs = Engine(golden.program, device="cpu", dtype=dtype, executor="eager")(golden.input)
    return tolerance(dtype, relative(torchs, golden.logits))


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        ([0, 0], [0, 0], 0), ([], [], 0), ([3, 4], [3, 4], 0), ([0, 4], [3, 4], 0.6), ([0, 1e-9], [0, 0], math.inf),
        ([math.nan], [1], math.inf), ([1], [math.nan], math.inf), ([math.inf], [math.inf], math.inf),
        ([math.inf], [1], math.inf), ([math.nan], [0], math.inf),
    ],
)  # fmt: skip
def test_what_the_error_of_answers_is(got: list[float], expected: list[float], error: float) -> None:
    assert of_package(torch.tensor(got), torch.tensor(expected)) == pytest.approx(error)


def test_what_rounding_explains() -> None:
    """Three times the error of torch in the type, and no more than a limit, which is all where nothing is rounded; one
    that torch itself does not keep is wider."""
    for of_torch in (0.0, 1.0):
        assert tolerance(torch.float32, of_torch) == 1e-5
    for dtype, most in ((torch.bfloat16, 3e-2), (torch.float16, 5e-3)):
        assert [tolerance(dtype, t) for t in (0.0, 1e-3, most / 2)] == pytest.approx([1e-5, 3e-3, most])
        assert [tolerance(dtype, t) for t in (0.04, 0.06, 1.0, math.inf)] == pytest.approx([0.06, 0.09, 0.1, 0.1])


@pytest.mark.parametrize("golden", CASES, ids=str)
def test_training_form(golden: Golden) -> None:
    model = load_checkpoint(golden.checkpoint, ema=golden.ema, activation=golden.activation)
    with torch.no_grad():
        assert relative(model(golden.input), golden.logits) < 1e-5


@pytest.mark.parametrize(
    ("executor", "dtype"), [("reference", torch.float32), *product(["eager", *OPTIONAL], DTYPES)], ids=str
)
@pytest.mark.parametrize("golden", CASES, ids=str)
def test_one_lane(golden: Golden, executor: str, dtype: torch.dtype) -> None:
    engine = Engine(golden.program, device="cpu", dtype=dtype, executor=executor)
    assert relative(engine(golden.input), golden.logits) < limit(golden, executor, dtype)


@pytest.mark.parametrize(("executor", "dtype"), [("reference", torch.float32), *product(OPTIONAL, DTYPES)], ids=str)
@pytest.mark.parametrize("lanes", [2, 3])
def test_several_lanes(lanes: int, executor: str, dtype: torch.dtype) -> None:
    golden = CASES[1]
    placement = Placement.by_streams(golden.program, lanes)
    engine = Engine(golden.program, placement, "cpu", dtype, executor)
    assert relative(engine(golden.input), golden.logits) < limit(golden, executor, dtype)


@pytest.mark.long
def test_inductor_on_two_lanes_in_bf16() -> None:
    """Two short streams, since compiling takes a second or two for each operation."""
    program = fold(lively(Config((8, 16, 32), blocks=(1, 1), num_classes=100), 0))
    placement, x = Placement.by_streams(program, 2), torch.randn(2, 3, 32, 32)
    expected = Engine(program, device="cpu", executor="reference")(x)
    of_torch = relative(Engine(program, device="cpu", dtype=torch.bfloat16, executor="eager")(x), expected)
    found = Engine(program, placement, "cpu", torch.bfloat16, "inductor")(x)
    assert relative(found, expected) < tolerance(torch.bfloat16, of_torch)


def test_the_activation_matters() -> None:
    """Any tolerance would notice the wrong activation, and plain weights taken for averaged ones."""
    golden = CASES[1]
    assert golden.activation == "silu"
    for wrong in (
        load_checkpoint(golden.checkpoint, ema=golden.ema, activation="relu"),
        load_checkpoint(golden.checkpoint, ema=not golden.ema, activation="silu"),
    ):
        assert relative(Engine(fold(wrong), executor="reference")(golden.input), golden.logits) > LIMIT[torch.bfloat16]
