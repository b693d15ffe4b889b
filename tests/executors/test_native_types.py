"""The CPU kernels in bf16 and int8: against the reference on networks of any shape, with poisoned buffers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_native_plan import features, plan_of, poison, reference

from conftest import OPTIONAL, SMALL, lively, relative
from isas import emulator, isa  # noqa: F401 (fixtures)
from parallel_parnet import Config, Engine, Placement, Program, fold, quantize
from parallel_parnet.executors.native_plan import NativePlan
from parallel_parnet.executors.segment import SegmentModule
from parallel_parnet.int8.agreement import agreement
from parallel_parnet.kernels.cpu import native

pytestmark = pytest.mark.skipif("native" not in OPTIONAL, reason="the CPU kernels were not built")

CPU = torch.device("cpu")


def any_program(data: st.DataObject) -> Program:
    """Widths that fill no word and no vector among them."""
    streams = data.draw(st.integers(1, 3))
    config = Config(
        (2 * data.draw(st.integers(2, 24)), *(4 * data.draw(st.integers(1, 12)) for _ in range(streams))),
        blocks=tuple(data.draw(st.integers(1, 2)) for _ in range(streams)),
        num_classes=10,
        activation=data.draw(st.sampled_from(("silu", "relu"))),
    )
    return fold(lively(config, data.draw(st.integers(0, 99))))


@pytest.mark.usefixtures("isa")
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_int8_on_networks_of_any_shape(data: st.DataObject) -> None:
    program, (h, w) = any_program(data), data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    m = program.size_multiple
    names = [op.name for op in program.operations if op.kind == "conv" and op.level > 1]
    keep = data.draw(st.lists(st.sampled_from(names), max_size=2)) if len(names) > 2 else []
    x = torch.randn(2, 3, m * h, m * w)
    made = quantize(program, x, keep, reduce_range=data.draw(st.booleans()))
    plan = plan_of(made, x.shape, data.draw(st.integers(1, 3)))
    poison(plan)
    assert plan(x)[0].isfinite().all()
    for feature in features(plan):
        border = torch.full_like(feature.padded, feature.zero)
        border[:, 1:-1, 1:-1] = feature.padded[:, 1:-1, 1:-1]
        assert torch.equal(border, feature.padded), "the border still stands for zeros"
    found = agreement(made, "native", x)
    assert found.steps <= 1 and found.moved <= 3 + 1e-3 * found.values and found.error < 1e-4, found


def at_the_limit(largest: int) -> Program:
    """A small network whose last int8 operation has weights of +-largest alone, for values of 0 and 255."""
    exact = fold(lively(SMALL, 3))
    made = quantize(exact, torch.randn(4, 3, 64, 64))
    last = next(op for op in reversed(made.operations) if f"{op.name}.weight_step" in made.weights)
    weight = made.weights[f"{last.name}.weight"]
    signs = torch.where(torch.arange(len(weight)) % 2 == 0, largest, -largest).view(-1, 1, 1, 1)
    weights = {
        f"{last.name}.weight": signs.expand_as(weight).to(torch.int8),
        f"{last.name}.weight_step": torch.full((last.cout,), 1 / (9 * last.cin * largest * 255)),
    }
    for name in last.inputs:
        weights |= {f"{name}.step": torch.tensor([1e-6]), f"{name}.zero": torch.zeros(1, dtype=torch.uint8)}
    return replace(made, weights=made.weights | weights)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("largest", [64, 65, 127])
def test_int8_where_sums_are_largest(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bits hold two products of weights up to 64; kernels that add up so many take no larger ones."""
    made, x = at_the_limit(largest), torch.randn(2, 3, 64, 64)
    found = agreement(made, "native", x)
    assert found.error < 1e-5, found
    if native.library().by_pairs() and largest > 64:
        monkeypatch.setattr("parallel_parnet.executors.native_plan.REDUCED", 127)
        assert agreement(made, "native", x).error > 1e-3, "which this would tell"


@pytest.mark.usefixtures("isa")
def test_int8_has_the_same_bits_for_any_number_of_threads_and_lanes() -> None:
    program, x = fold(lively(SMALL, 3)), torch.randn(2, 3, 96, 64)
    made = quantize(program, x)
    first = plan_of(made, x.shape)(x)[0]
    for threads in (2, 3, 8):
        assert torch.equal(plan_of(made, x.shape, threads)(x)[0], first)
    placement = Placement.from_streams_per_gpu(made, 1, 3)
    assert torch.equal(Engine(made, placement, "cpu", executor="native")(x), first)


def test_a_sensor_that_fails_is_not_hidden_in_int8() -> None:
    program, x = fold(lively(SMALL, 3)), torch.randn(1, 3, 64, 64)
    made = quantize(program, x)
    x[0, 1, 40, 9] = torch.nan
    assert plan_of(made, x.shape)(x)[0].isnan().all()


@pytest.mark.usefixtures("isa")
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_bf16_on_networks_of_any_shape(data: st.DataObject) -> None:
    """As near as torch's own bf16, whose convolutions round once more; also without instructions for it."""
    program = any_program(data)
    m = program.size_multiple
    x = torch.randn(2, 3, m * data.draw(st.integers(1, 3)), m * data.draw(st.integers(1, 3)))
    (segment,) = Placement.single(program).segments(program)
    module = SegmentModule(program, segment, torch.float32, CPU)
    plan = NativePlan(module, [x.shape], data.draw(st.integers(1, 3)), torch.bfloat16)
    poison(plan)
    expected = reference(program, x)
    of_torch = relative(Engine(program, device="cpu", dtype=torch.bfloat16, executor="eager")(x), expected)
    assert 1e-5 < relative(plan(x)[0], expected) < 2 * of_torch + 2**-7
