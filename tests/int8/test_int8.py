"""Int8 from pictures: ranges, samples, and the programs that they make."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel_parnet import Engine, ParNetError, Program, fold, quantize
from parallel_parnet.int8 import samples
from parallel_parnet.int8.calibration import Calibration
from parallel_parnet.int8.errors import errors, errors_alone
from parallel_parnet.int8.kernels import in_int8, quantisable_operations
from parallel_parnet.int8.quantize import calibrate
from parallel_parnet.int8.ranges import Range, best, between, squared_error
from parallel_parnet.program.families import parallel_chains
from small import SMALL, lively, relative

EXACT = fold(lively(SMALL, 6))
PICTURES = torch.randn(16, 3, 64, 64)
RANGES = calibrate(EXACT, PICTURES)
PROGRAM = in_int8(EXACT, RANGES)


def grid_error(values: np.ndarray, low: float, high: float) -> float:
    """Of the 256 numbers from low to high that have zero among them, each value by the nearest: in float64."""
    step = (high - low) / 255
    zero = np.clip(np.rint(-low / step), 0, 255)
    numbers = step * (np.arange(256) - zero)
    at = np.clip(np.searchsorted(numbers, values), 1, 255)
    return float((np.minimum(abs(values - numbers[at - 1]), abs(values - numbers[at])) ** 2).sum())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), tail=st.floats(0, 30), shift=st.floats(-3, 3))
def test_a_range_has_the_least_error_of_all(seed: int, tail: float, shift: float) -> None:
    """Within 5% of the best of 400 pairs of ends, whatever lies far out, and on either side of zero."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.standard_normal(2000) + shift, tail * rng.standard_normal(5)]).astype(np.float32)
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    found = best(torch.from_numpy(values), low, high)
    got = squared_error(torch.from_numpy(values), found)
    assert got == pytest.approx(grid_error(values, -found.step * found.zero, found.step * (255 - found.zero)), rel=1e-2)
    shares = np.linspace(0.25, 1, 20)
    least = min(grid_error(values, a * low, b * high) for a in shares for b in shares if b * high > a * low)
    assert got <= 1.05 * least and got <= grid_error(values, low, high) * (1 + 1e-5)


def test_ranges_at_the_edges() -> None:
    assert between(0.0, 0.0).zero == 0 and between(0.0, 0.0).step > 0
    assert between(2.0, 510.0) == Range(2.0, 0) and between(-510.0, -1.0) == Range(2.0, 255)
    assert between(0.0, 1e38).step * 255 < float("inf") and between(-1.0, 0.0).zero == 255
    for constant in (0.0, 3.0, -3.0, 1e-40, 1e37):
        values = torch.full((100,), constant)
        made = best(values, min(constant, 0), max(constant, 0))
        assert squared_error(values, made) <= (1e-3 * constant) ** 2 * 100 + 1e-70
        weights = {"step": torch.tensor([made.step]), "zero": torch.tensor([made.zero], dtype=torch.uint8)}
        named = {f"inits.0.0.{name}": tensor for name, tensor in weights.items()}
        assert Program(EXACT.config, EXACT.operations, {**EXACT.weights, **named}).quantised, "the contract takes it"


def test_samples_are_bounded_and_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture has its part, the first as well as the last, and the ends are exact."""
    monkeypatch.setattr(samples, "MOST", 4096)
    taken = samples.Sample(torch.Generator().manual_seed(0))
    for i in range(200):
        feature = torch.full((1, 2, 8, 8), float(i))
        feature[0, 1, 3, 4] = -i
        taken.add(feature)
    assert 2048 <= len(taken.values) <= 4096 and (taken.low, taken.high) == (-199, 199)
    counts = torch.histc(taken.values.abs(), 10, 0, 200)
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.5 * counts.mean()
    taken = samples.Sample(torch.Generator().manual_seed(0))
    for pictures in (1, 4):
        taken.add(torch.full((pictures, 2, 8, 8), float(pictures)))
    assert taken.values.mean() == pytest.approx((1 + 4 * 4) / 5, rel=0.1), "those that come at once have theirs each"


def test_one_tensor_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends are the same however pictures come; and those that come at once are computed some at a time."""
    assert quantize(EXACT, PICTURES).digest == PROGRAM.digest
    assert calibrate(EXACT, PICTURES, seed=1) != RANGES, "another choice of values"
    batches: Iterator[Tensor] = iter(PICTURES.split(5))
    one_by_one = samples.sample(EXACT, ["inits.0.0"], batches, 0)["inits.0.0"]
    monkeypatch.setattr(samples, "PIXELS", 3 * 64 * 64)
    assert [len(batch) for batch in samples.some_at_a_time(PICTURES)] == [3] * 5 + [1]
    at_once = samples.sample(EXACT, ["inits.0.0"], PICTURES, 0)["inits.0.0"]
    assert (one_by_one.low, one_by_one.high) == pytest.approx((at_once.low, at_once.high), rel=1e-5)


def test_kernels_are_the_nearest_integers() -> None:
    """Of weights times the step of the input that they multiply: in each input's part, of both inputs together."""
    for name in ("streams.1.1", "combine.2"):
        op = PROGRAM.by_name[name]
        weight, step = (PROGRAM.weights[f"{name}.{w}"].double() for w in ("weight", "weight_step"))
        width = weight.shape[1] // len(op.inputs)
        for i, feature in enumerate(op.inputs):
            exact = EXACT.weights[f"{name}.weight"].double()[:, i * width : (i + 1) * width]
            got = weight[:, i * width : (i + 1) * width] * step.view(-1, 1, 1, 1) / RANGES[feature].step
            half = step.view(-1, 1, 1, 1) / RANGES[feature].step / 2
            assert bool(((got - exact).abs() <= half * (1 + 1e-5)).all())
        assert bool((weight.abs().flatten(1).amax(1) == 127).all())


def test_weights_of_nothing_and_of_nearly_nothing() -> None:
    for value in (0.0, 1e-42, 1e30):
        weights = dict(EXACT.weights) | {"streams.0.1.weight": torch.full((8, 8, 3, 3), value)}
        made = in_int8(Program(EXACT.config, EXACT.operations, weights), RANGES)
        assert bool((made.weights["streams.0.1.weight_step"] > 0).all())


def test_outputs_stay() -> None:
    exact = fold(lively(SMALL, 6), outputs=("streams.1", "fused", "logits"))
    program, x = quantize(exact, PICTURES), torch.randn(2, 3, 64, 64)
    answer, expected = (Engine(p, device="cpu", executor="eager")(x) for p in (program, exact))
    assert isinstance(answer, dict) and isinstance(expected, dict) and list(answer) == list(expected)
    assert all(1e-4 < relative(answer[name], expected[name]) < 0.3 for name in answer)
    got, right = (Engine(p, device="cpu", executor="reference")(x) for p in (program, exact))
    assert errors({"": program}, exact, x)[""] == pytest.approx(max(relative(got[n], right[n]) for n in right))
    step = program.weights.get("streams.1.4.step")  # which fusion reads
    assert step is not None and relative(answer["streams.1"] / step, (answer["streams.1"] / step).round()) < 1e-6
    assert "combine.3.step" not in program.weights, "which the classifier alone reads"


def test_what_each_operation_costs() -> None:
    x = torch.randn(8, 3, 64, 64)
    alone = errors_alone(EXACT, partial(in_int8, EXACT, RANGES), x)
    assert list(alone) == [op.name for op in quantisable_operations(EXACT)]
    everything = errors({"": PROGRAM}, EXACT, x.split(3))[""]
    assert min(alone.values()) > 0 and max(alone.values()) / 2 < everything < sum(alone.values())  # some cancel
    logits = [Engine(p, device="cpu", executor="reference")(x) for p in (PROGRAM, EXACT)]
    assert everything == pytest.approx(relative(*logits), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: quantize(PROGRAM, PICTURES), "quantised already"),
        (lambda: quantize(torch.nn.Identity(), PICTURES), r"takes a program, such as fold\(model\), .* a Identity"),
        (lambda: quantize(EXACT, []), "no pictures for calibration"),
        (lambda: quantize(EXACT, torch.full((1, 3, 64, 64), torch.nan)), "non-finite"),
        (lambda: quantize(EXACT, [PICTURES, torch.full((1, 3, 64, 64), torch.inf)]), "non-finite"),
        (lambda: quantize(EXACT, torch.full((1, 3, 64, 64), 1e38)), "feature '.*' .* non-finite"),
        (lambda: quantize(EXACT, PICTURES[0]), r"give a tensor \[N, 3, H, W\]"),
        (lambda: quantize(EXACT, PICTURES[:0]), r"expected a tensor \[N, 3, H, W\]"),
        (lambda: quantize(EXACT, PICTURES[..., :63]), "multiples of 32"),
        (lambda: quantize(EXACT, PICTURES, ["streams.0.9"]), "has this name; some are called streams.0"),
        (lambda: quantize(EXACT, PICTURES, "streams.0.1"), "keep 'streams.0.1': give a list of names"),
        (lambda: quantize(EXACT, PICTURES, list(EXACT.by_name)), "nothing is left to quantise"),
        (lambda: in_int8(EXACT, {}), "feature 'inits.0.0' has no range"),
        (lambda: errors({}, EXACT, []), "no pictures to compare"),
    ],
)
def test_what_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ParNetError, match=message):
        change()


def test_a_calibration_gives_the_same_program(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    keep = ("streams.0.1", "combine.3")
    Calibration.of(EXACT, RANGES, keep, {"data": "noise"}).save(path)
    found = Calibration.load(path)
    assert (found.features, found.keep, found.made) == (RANGES, keep, {"data": "noise"})
    assert found.applied(EXACT).digest == in_int8(EXACT, RANGES, keep).digest != PROGRAM.digest
    with pytest.raises(ParNetError, match="of another network, or of other weights"):
        found.applied(fold(lively(SMALL, 7)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "parallel_parnet.program.1"}, "no calibration .*another format"),
        ({"features": None}, "no calibration"),
        ({"features": {"inits.0.0": {"step": 0.1}}}, "no calibration"),
        ({"features": {"inits.0.0": {"step": 0.1, "zero": 3}}}, "step or zero of 'inits.0.0'"),  # 0.1 is not fp32
        ({"features": {"inits.0.0": {"step": 0.0, "zero": 3}}}, "step or zero of 'inits.0.0'"),
        ({"features": {"inits.0.0": {"step": 0.5, "zero": 256}}}, "step or zero of 'inits.0.0'"),
        ({"features": {"inits.0.0": {"step": 0.5, "zero": True}}}, "step or zero of 'inits.0.0'"),
        ({"features": {"inits.0.0": {"step": "0.5", "zero": 3}}}, "step or zero of 'inits.0.0'"),
        ({"keep": [3]}, "a name that is no text"),
        ({"program": None}, "a digest or a name"),
        ({"colour": "red"}, "no calibration"),
    ],
)
def test_damaged_calibrations(fields: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    Calibration.of(EXACT, RANGES, (), {}).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ParNetError, match=rf"^\S*c\.json: [^\n]*{message}[^\n]*$"):
        Calibration.load(path)


def test_calibrations_that_no_longer_fit(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    with pytest.raises(ParNetError, match=r"c\.json: cannot be read"):
        Calibration.load(path)
    for text in ("[", "[" * 100_000, "5", "\0"):
        path.write_text(text)
        with pytest.raises(ParNetError, match=r"c\.json: no calibration"):
            Calibration.load(path)
    Calibration.of(EXACT, RANGES, (), {}).save(path)
    fields = json.loads(path.read_text())
    fields["features"]["inits.0.0"]["zero"] ^= 1
    path.write_text(json.dumps(fields))
    with pytest.raises(ParNetError, match="of another version, which rounds weights otherwise"):
        Calibration.load(path).applied(EXACT)


@pytest.mark.parametrize("setting", [torch.inference_mode, lambda: torch.device("meta"),
                                     lambda: torch.autocast("cpu", torch.bfloat16)])  # fmt: skip
def test_settings_of_the_caller(setting: Any) -> None:
    with setting():
        made = quantize(EXACT, PICTURES)
        again = in_int8(EXACT, RANGES)
    assert made.digest == again.digest == PROGRAM.digest
    assert not any(tensor.is_inference() for tensor in (*made.weights.values(), *again.weights.values()))


def test_deep_programs() -> None:
    """Many features, one reader each: memory and time by feature."""
    exact = parallel_chains(24, 3, 8, 32)
    program = quantize(exact, torch.randn(4, 3, 32, 32))
    assert errors({"": program}, exact, torch.randn(4, 3, 32, 32))[""] < 0.2
