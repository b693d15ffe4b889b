"""The CPU kernels in bf16 and int8: against the reference on networks of any shape, with poisoned buffers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from isas import ISAS, UseIsa, emulator, isa, use_isa  # noqa: F401 (fixtures)
from parallel_parnet import Config, Engine, Placement, Program, fold, quantize
from parallel_parnet.executors import native_algorithm, native_plan
from parallel_parnet.int8.agreement import MOVED, SPARE, agreement
from parallel_parnet.kernels.cpu import native
from parallel_parnet.program.program import INPUT, Operation
from plans import borders_are_zeros, features, plan_of, poison, reference
from small import OPTIONAL, SMALL, conv, lively, relative, weightless

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


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_int8_on_networks_of_any_shape(data: st.DataObject, use_isa: UseIsa) -> None:  # noqa: F811
    program, (h, w) = any_program(data), data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    m = program.size_multiple
    names = [op.name for op in program.operations if op.kind == "conv" and op.level > 1]
    keep = data.draw(st.lists(st.sampled_from(names), max_size=2)) if len(names) > 2 else []
    x = torch.randn(2, 3, m * h, m * w)
    made, threads = quantize(program, x, keep), data.draw(st.integers(1, 3))
    for name in ISAS:
        with use_isa(name):
            plan = plan_of(made, x.shape, threads)
            poison(plan)
            assert plan(x)[0].isfinite().all(), name
            assert borders_are_zeros(plan), name
            found = agreement(made, "native", x)
            right = found.steps <= 1 and found.moved <= SPARE + MOVED * found.values and found.error < 1e-4
            assert right, (name, found)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_int8_by_winograd_has_the_bits_of_direct_convolutions(data: st.DataObject, use_isa: UseIsa) -> None:  # noqa: F811
    """They are transformed to 16 bits, which loses nothing."""
    program = any_program(data)
    m = program.size_multiple
    x = torch.randn(2, 3, m * data.draw(st.integers(1, 3)), m * data.draw(st.integers(1, 3)))
    made = quantize(program, x)
    large, threads = data.draw(st.booleans()), data.draw(st.integers(1, 64))

    def winograd(op: Operation, w: dict[str, Tensor], dtype: torch.dtype, *_: int) -> int:
        pairs = op.cin // op.groups % 2 == 0
        by_stride = (native.F4, native.S4) if large else (native.F2, native.S2)
        return by_stride[op.stride - 1] if dtype == torch.uint8 and pairs else native.DIRECT

    for name in ISAS:
        with use_isa(name), pytest.MonkeyPatch.context() as patch:
            patch.setattr(native_plan, "algorithm_of", winograd)
            plan = plan_of(made, x.shape, threads)
            patch.setattr(native_plan, "algorithm_of", lambda *_: native.DIRECT)
            direct = plan_of(made, x.shape)
            poison(plan)
            assert relative(plan(x)[0], direct(x)[0]) < 1e-6, f"{name}: only what is averaged at the end is fp32"
            for one, other in zip(features(plan), features(direct), strict=True):
                assert one.padded.dtype != torch.uint8 or torch.equal(one.padded, other.padded), name


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("wide", [64, 114, 116, 1840, 1842])
def test_int8_where_sums_are_largest(wide: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All values 255 and all weights 127: as many channels as algorithms have room for, and two more."""
    first = replace(conv("a", "stem", None, 1, (INPUT,)), cout=wide, activation="relu")
    second = replace(conv("b", "stem", None, 2, ("a",)), cin=wide, stride=stride, activation="relu")
    exact = weightless(first, second, Operation("fc", "classifier", "head", None, 3, ("b",), 8, 10))
    weights = exact.weights | {
        "a.bias": torch.full((wide,), 255.0),
        "a.step": torch.ones(1),
        "a.zero": torch.zeros(1, dtype=torch.uint8),
        "b.weight": torch.full((8, wide, 3, 3), 127, dtype=torch.int8),
        "b.weight_step": torch.ones(8),
    }
    program = replace(exact, weights=weights)
    monkeypatch.setattr(native_algorithm, "WORTH", float("inf"))
    plan = plan_of(program, (1, 3, 32, 32))
    (algorithm,) = {op.algorithm for op in plan.ops if op.x_type == native.TYPES[torch.uint8]}
    if native.library().has_tiles():
        assert algorithm == native.DIRECT
    elif stride == 1:
        assert algorithm == (native.F4 if wide < 116 else native.F2 if wide < 1842 else native.DIRECT)
    else:
        assert algorithm == (native.S4 if wide < 1842 else native.S2)
    plan(torch.randn(1, 3, 32, 32))
    assert features(plan)[-1].nchw[0, 3, 5, 5] == torch.tensor(9.0 * 127 * 255 * wide)


@pytest.mark.usefixtures("isa")
def test_int8_has_the_same_bits_for_any_number_of_threads_and_lanes() -> None:
    program, x = fold(lively(SMALL, 3)), torch.randn(2, 3, 96, 64)
    made = quantize(program, x)
    first = plan_of(made, x.shape)(x)[0]
    for threads in (2, 3, 8):
        assert torch.equal(plan_of(made, x.shape, threads)(x)[0], first)
    placement = Placement.by_streams(made, 3)
    assert torch.equal(Engine(made, placement, "cpu", executor="native")(x), first)


def test_a_sensor_that_fails_is_not_hidden_in_int8() -> None:
    program, x = fold(lively(SMALL, 3)), torch.randn(1, 3, 64, 64)
    made = quantize(program, x)
    x[0, 1, 40, 9] = torch.nan
    assert plan_of(made, x.shape)(x)[0].isnan().all()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bf16_on_networks_of_any_shape(data: st.DataObject, use_isa: UseIsa) -> None:  # noqa: F811
    """As near as torch's own bf16, whose convolutions round once more; also without instructions for it."""
    program = any_program(data)
    m = program.size_multiple
    x = torch.randn(2, 3, m * data.draw(st.integers(1, 3)), m * data.draw(st.integers(1, 3)))
    expected, threads = reference(program, x), data.draw(st.integers(1, 3))
    of_torch = relative(Engine(program, device="cpu", dtype=torch.bfloat16, executor="eager")(x), expected)
    for name in ISAS:
        with use_isa(name):
            plan = plan_of(program, x.shape, threads, torch.bfloat16)
            poison(plan)
            assert 1e-5 < relative(plan(x)[0], expected) < 4 * of_torch + 2**-6, name


def by_bias(*bias: float) -> Program:
    """8 features of these values, whatever the picture; they are an answer, and a classifier averages them."""
    first = replace(conv("a", "stem", None, 1, (INPUT,)), activation="relu")
    program = weightless(first, Operation("fc", "classifier", "head", None, 2, ("a",), 8, 10))
    weights = program.weights | {"a.bias": torch.tensor(bias)}
    return replace(program, weights=weights, outputs={"a": "a", "logits": "fc"})


@pytest.mark.usefixtures("isa")
def test_bf16_is_the_nearest_and_answers_and_sums_are_of_what_is_stored() -> None:
    """The first two lie between two values of bf16, and go to the even one."""
    bias = (1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1.99999, 3.14159, 0.1, 255.7, 1e-20)
    nearest = torch.tensor(bias).bfloat16()
    plan = plan_of(by_bias(*bias), (1, 3, 32, 32), dtype=torch.bfloat16)
    answers = dict(zip(plan.module.segment.writes, plan(torch.zeros(1, 3, 32, 32)), strict=True))
    a = features(plan)[-1]
    assert torch.equal(a.padded[0, 5, 5], nearest)
    assert torch.equal(answers["a"][0, :, 5, 5], nearest.float())
    assert a.sums is not None
    torch.testing.assert_close(a.sums.sum(1)[0], nearest.float() * 32 * 32, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1], ids=hex)
def test_no_nan_becomes_a_number_in_bf16(bits: int) -> None:
    plan = plan_of(by_bias(*[0.0] * 8), (1, 3, 32, 32), dtype=torch.bfloat16)
    plan(torch.full((1, 3, 32, 32), bits, dtype=torch.int32).view(torch.float32))
    assert features(plan)[-1].padded[0, 1:-1, 1:-1].isnan().all()
