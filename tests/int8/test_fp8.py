"""FP8 from pictures: steps, and the programs that they make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel_parnet import Engine, ParNetError, fold, quantize
from parallel_parnet.int8.e4m3 import HEADROOM, in_fp8, reach, step_of
from parallel_parnet.program.contract import E4M3, LEAST_STEP, MOST_STEP
from small import SMALL, golden_cases, lively, relative

EXACT = fold(lively(SMALL, 6))
PICTURES = torch.randn(16, 3, 64, 64)
LARGEST = reach(EXACT, PICTURES)
PROGRAM = in_fp8(EXACT, LARGEST)


def test_steps_are_the_powers_of_two_that_leave_room() -> None:
    largest = torch.tensor([448 / HEADROOM, 440 / HEADROOM, 1e-3, 0.0, 1e-37, 1e38])
    step = step_of(largest)
    assert step.tolist() == [2.0, 1.0, 2.0**-15, 1.0, LEAST_STEP, MOST_STEP]
    values = torch.rand(1000) * 1e6
    share = HEADROOM * values / step_of(values)
    assert share.min() >= 224 and share.max() <= 448


def test_what_channels_reach_is_of_all_pictures() -> None:
    """Channel by channel, however the pictures come."""
    name = "streams.1.0"
    whole = type(EXACT)(EXACT.config, EXACT.operations, EXACT.weights, {name: name})
    answer = Engine(whole, device="cpu", executor="reference")(PICTURES)
    assert isinstance(answer, dict)
    torch.testing.assert_close(LARGEST[name], answer[name].abs().amax((0, 2, 3)))
    assert quantize(EXACT, PICTURES.split(5), to=E4M3).digest == PROGRAM.digest


def test_kernels_are_the_nearest_numbers() -> None:
    """Of weights times the step of the channel that they multiply: in each group's part of each input."""
    for name in ("streams.1.1", "combine.2", "downsamples_2.1"):
        op = PROGRAM.by_name[name]
        stored, step = PROGRAM.weights[f"{name}.weight"].double(), PROGRAM.weights[f"{name}.weight_step"].double()
        part, rows = op.cin // len(op.inputs) // op.groups, op.cout // op.groups
        for o in range(op.cout):
            for k in range(op.cin // op.groups):
                channel = o // rows * part + k % part
                of_input = PROGRAM.weights[f"{op.inputs[k // part]}.step"][channel].double()
                exact = EXACT.weights[f"{name}.weight"][o, k].double() * of_input / step[o]
                assert ((stored[o, k] - exact).abs() <= exact.abs() * 2**-4 + 2**-10).all()
        assert (stored.abs().flatten(1).amax(1) == 448).all()


@pytest.mark.parametrize("wrong", ["streams.2.4.step", "downsamples_2.1.step", "combine.2.step"])
def test_a_wrong_golden_network_is_further_away(wrong: str) -> None:
    """Than any in test_types.py."""
    golden = golden_cases()[0]
    program = quantize(golden.program, torch.randn(16, *golden.input.shape[1:]), to=E4M3)
    weights = {**program.weights, wrong: program.weights[wrong].flip(0)}
    spoilt = type(program)(program.config, program.operations, weights)
    assert relative(Engine(spoilt, device="cpu", executor="eager")(golden.input), golden.logits) > 0.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: quantize(PROGRAM, PICTURES, to=E4M3), "quantised already"),
        (lambda: quantize(EXACT, [], to=E4M3), "no pictures for calibration"),
        (lambda: quantize(EXACT, PICTURES, to=torch.float8_e5m2), "e5m2: choose torch.int8 or torch.float8_e4m3fn"),
        (lambda: quantize(EXACT, PICTURES, list(EXACT.by_name), E4M3), "nothing is left to quantise"),
        (lambda: in_fp8(EXACT, {}), "feature 'inits.0.0' has no range"),
    ],
)
def test_what_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ParNetError, match=message):
        change()
