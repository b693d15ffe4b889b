"""The CPU kernels: against plain torch on networks of any shape, and the same bits however they are run."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isas import ISAS, UseIsa, emulator, isa, use_isa  # noqa: F401 (fixtures)
from parallel_parnet import Config, Engine, ParNetError, Placement, Program, fold
from parallel_parnet.executors import native_algorithm
from parallel_parnet.executors.native_plan import NativePlan
from parallel_parnet.executors.segment import SegmentModule
from parallel_parnet.kernels.cpu import native
from parallel_parnet.program import contract
from parallel_parnet.program.families import parallel_chains
from parallel_parnet.program.placement import Segment
from parallel_parnet.program.program import INPUT, Operation
from parallel_parnet.program.rivals import resnet
from plans import borders_are_zeros, plan_of, poison, reference
from small import OPTIONAL, SMALL, conv, lively, relative, weightless
from ungated import noise, random_placement

pytestmark = pytest.mark.skipif("native" not in OPTIONAL, reason="the CPU kernels were not compiled")

CPU = torch.device("cpu")
PROGRAM = fold(lively(SMALL, 3))
UNGATED = resnet((1, 1), bottleneck=True, width=8, classes=10, size=64)
ALWAYS = float("inf")  # as what a direct convolution may leave: all that can goes by Winograd


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_networks_of_any_shape(data: st.DataObject, use_isa: UseIsa) -> None:  # noqa: F811
    """Widths that fill no vector, features of odd sizes, batches; every task leaves its neighbours alone. A few of such
    networks lose five bits to cancellation: both sides are then 1e-5 from fp64, and further from each other."""
    streams = data.draw(st.integers(1, 4))
    config = Config(
        tuple(4 * data.draw(st.integers(1, 12)) for _ in range(streams + 1)),
        blocks=tuple(data.draw(st.integers(1, 2)) for _ in range(streams)),
        num_classes=data.draw(st.integers(8, 40)),
        activation=data.draw(st.sampled_from(("silu", "relu"))),
    )
    program = fold(lively(config, data.draw(st.integers(0, 99))))
    m = program.size_multiple
    x = torch.randn(data.draw(st.integers(1, 3)), 3, m * data.draw(st.integers(1, 3)), m * data.draw(st.integers(1, 3)))
    worth = data.draw(st.sampled_from((ALWAYS, native_algorithm.WORTH)))
    threads, expected = data.draw(st.integers(1, 3)), reference(program, x)
    for name in ISAS:
        with use_isa(name), pytest.MonkeyPatch.context() as patch:
            patch.setattr(native_algorithm, "WORTH", worth)
            plan = plan_of(program, x.shape, threads)
            poison(plan)
            assert relative(plan(x)[0], expected) < 1e-4, name
            assert borders_are_zeros(plan), name


@settings(max_examples=10, deadline=None)
@given(st.data(), st.integers(2, 3))
def test_any_placement(data: st.DataObject, lanes: int) -> None:
    placement, x = random_placement(PROGRAM, lanes, data.draw), noise(data.draw, 2, 3, 64, 32)
    assert relative(Engine(PROGRAM, placement, "cpu", executor="native")(x), reference(PROGRAM, x)) < 1e-5


@pytest.mark.parametrize("program", [PROGRAM, UNGATED], ids=["gated", "ungated"])
def test_the_same_bits_for_any_number_of_threads(program: Program) -> None:
    x, other = torch.randn(2, 2, 3, 96, 160)
    plans = [plan_of(program, x.shape, threads) for threads in (1, 2, 3, 8)]
    first = plans[0](x)[0].clone()
    for plan in plans:
        for _ in range(5):
            assert torch.equal(plan(x)[0], first)
            assert not torch.equal(plan(other)[0], first)


def chosen(dtype: torch.dtype, width: int, size: int, stride: int = 1) -> int:
    """The algorithm of a convolution of `width` channels to features of size x size pixels."""
    op = replace(conv("b", "stem", None, 2, ("a",)), cin=width, cout=width, stride=stride)
    return native_algorithm.algorithm_of(op, {"weight": torch.ones(width, width, 3, 3)}, dtype, size, size)


def test_small_features_are_convolved_directly_and_large_ones_by_the_largest_tiles() -> None:
    """Transforms and the reading of more weights pay for themselves once there are pixels enough to share them."""
    by_tile = [native.DIRECT, native.F2, native.F4]
    taken = [by_tile.index(chosen(torch.float32, 64, size)) for size in (1, 2, 8, 28)]
    assert taken[0] == taken[1] == 0 < taken[2] <= taken[3] == 2
    assert [chosen(torch.float32, 64, size, stride=2) for size in (1, 28)] == [native.DIRECT, native.S4]
    assert chosen(torch.float32, 64, 4) == (native.DIRECT if native.library().has_tiles() else native.F2), (
        "a slow cache"
    )


def test_few_channels_are_convolved_directly() -> None:
    """They would share a transform among too few products."""
    assert chosen(torch.float32, 64, 8) != native.DIRECT == chosen(torch.float32, 4, 8)


def test_algorithms_suit_the_types_digits_and_instructions() -> None:
    for stride, small, large in ((1, native.F2, native.F4), (2, native.S2, native.S4)):
        found = {dtype: chosen(dtype, 64, 28, stride) for dtype in native.TYPES}
        assert found[torch.float32] == large
        if native.library().has_tiles():
            assert found[torch.bfloat16] == found[torch.uint8] == native.DIRECT
        else:
            assert found[torch.bfloat16] == small, "whose transforms cost fewer digits"
            assert found[torch.uint8] in (large, native.DIRECT), "by whether an instruction makes four products"


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("width", [128, 100])  # the second fills no vector, so that one task transforms it
def test_convolutions_wait_for_gates_and_transforms(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_algorithm, "WORTH", ALWAYS)
    program = fold(lively(Config((8, width, width), blocks=(1, 1), num_classes=10), 3))
    x, other = torch.randn(2, 1, 3, 96, 64)
    plan = plan_of(program, x.shape, threads=64)  # more than a level has tasks, so that each has one
    poison(plan)
    first = plan(x)[0].clone()
    assert relative(first, reference(program, x)) < 1e-5
    assert torch.equal(first, plan_of(program, x.shape)(x)[0]), "as one task alone transforms and convolves"
    transforms = [task.op for task in plan.tasks if task.kind == native.TRANSFORM]
    assert transforms and (len(transforms) > len(set(transforms))) == (width == 128)
    for begin, end in itertools.pairwise(plan.ends):
        late = sorted(plan.tasks[begin:end], key=lambda task: task.kind in (native.GATE, native.TRANSFORM))
        plan.tasks[begin:end] = [native.Task.from_buffer_copy(task) for task in late]
    for _ in range(20):
        plan(other)
        assert torch.equal(plan(x)[0], first)


def test_each_convolution_counts_gates_and_transforms_of_its_own() -> None:
    """One count for each picture's gate, and one for each part of a picture."""
    n = 3
    plan = plan_of(PROGRAM, (n, 3, 96, 64), threads=4)
    own = [range(op.counts, op.counts + n + n * op.chunks) for op in plan.ops if op.panel_count]
    assert all(one.stop <= other.start for one, other in itertools.pairwise(own))
    assert own[-1].stop <= plan._pass.count_number


def test_pictures_of_any_strides() -> None:
    x = torch.randn(2, 3, 32, 64)
    plan = plan_of(PROGRAM, x.shape)
    first = plan(x)[0].clone()
    for strided in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, torch.stack([x, x], -1)[..., 1]):
        assert torch.equal(plan(strided)[0], first)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_profile_is_of_the_kernels(lanes: int) -> None:
    """Each operation in a span of its own; together they are the pass."""
    placement = Placement.by_streams(PROGRAM, lanes)
    engine, x = Engine(PROGRAM, placement, "cpu", executor="native"), torch.randn(1, 3, 32, 64)
    expected = engine(x)
    plans = [r._compiled for r in engine._executors[False].kept(x.shape).bindings._runners.values()]
    with torch.inference_mode():
        for plan in plans:
            poison(plan)
    spans = [span.name for recorder in engine.profile(x) for span in recorder.spans]
    assert sorted(spans) == sorted(name for s in placement.segments(PROGRAM) for name in s.operations)
    assert torch.equal(plans[-1].outputs[0], expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("width", [16, 36])
def test_features_of_any_strides(width: int) -> None:
    """As other lanes send them, as another segment of the lane left them, and as torch has them."""
    program = fold(lively(Config((width, 40, 48), blocks=(3, 2), num_classes=10), 1))
    x = torch.randn(2, *program.shape("streams.0.0", 1, 32, 32)[1:])
    left = torch.full((2, x.shape[2] + 2, x.shape[3] + 2, width), torch.nan)[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
    segment = Segment(0, ("streams.0.1",), ("streams.0.0",), ("streams.0.1",))
    module = SegmentModule(program, segment, torch.float32, CPU)
    plan = NativePlan(module, [x.shape], 1)
    poison(plan)
    first = plan(x)[0].clone()
    assert relative(first, module(x)[0]) < 3e-5
    for strided in (x.to(memory_format=torch.channels_last), left.copy_(x), x.mT.contiguous().mT):
        poison(plan)
        assert torch.equal(plan(strided)[0], first)


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_values_out_of_the_ordinary(activation: str) -> None:
    program = fold(lively(Config((8, 16, 32, 64), num_classes=10, activation=activation), 1))
    # always the same: of 300 others 1e4 times as bright, gates made 1e-2 of one's rounding, and of torch's as well
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for scale in (1e-30, 1e4):
        assert relative(plan_of(program, x.shape)(x * scale)[0], reference(program, x * scale)) < 1e-4
    x[0, 1, 40, 9] = torch.nan
    assert plan_of(program, x.shape)(x)[0].isnan().all(), "a sensor that fails is not hidden"


def test_the_gate_of_what_is_far_below_zero_is_shut() -> None:
    """-1e38 times the smallest gate that the exponential's limit would leave is -1.6."""
    made = parallel_chains(4, 2, 8, 32)
    for name, value in (("streams.0.0.bias", -1e38), ("streams.0.0.gate_bias", -100.0), ("streams.0.0.shift", 1e38)):
        weights = dict(made.weights) | {name: torch.full((8,), value)}
        if "shift" in name:
            weights["streams.0.0.gate_bias"] = torch.full((8,), -100.0)
        program, x = Program(made.config, made.operations, weights), torch.randn(1, 3, 32, 32)
        assert relative(plan_of(program, x.shape)(x)[0], reference(program, x)) < 1e-5


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("value", [3.4e38, 1e38, 1e5, -1e5, -1e38, -3.4e38])
def test_gates_of_any_number(value: float) -> None:
    """Near fp32's largest, what an exponential takes apart is infinite."""
    made = parallel_chains(4, 2, 8, 32)
    weights = dict(made.weights) | {"streams.0.0.gate_bias": torch.full((8,), value)}
    program, x = Program(made.config, made.operations, weights), torch.randn(1, 3, 32, 32)
    assert relative(plan_of(program, x.shape)(x)[0], reference(program, x)) < 1e-5


def test_weights_whose_sums_leave_the_range() -> None:
    """Winograd adds up to nine of them before it multiplies; a direct convolution multiplies first."""
    made = parallel_chains(4, 2, 8, 32)
    weights = dict(made.weights) | {"streams.0.0.weight": torch.full((8, 8, 3, 3), 2e38)}
    weights |= {f"streams.0.0.{name}": torch.zeros(8) for name in ("bias", "scale", "shift")}
    weights["stem.weight"] = made.weights["stem.weight"] * 1e-36
    weights["stem.bias"] = torch.zeros(8)
    program, x = Program(made.config, made.operations, weights), torch.rand(1, 3, 32, 32)
    expected = reference(program, x)
    assert expected.isfinite().all() and relative(plan_of(program, x.shape)(x)[0], expected) < 1e-4


def test_weights_are_packed_once_for_all_shapes() -> None:
    engine = Engine(PROGRAM, device="cpu", executor="native")
    engine(torch.randn(1, 3, 64, 64))
    (module,) = engine._executors[False].backend.modules.values()  # type: ignore[union-attr]
    assert [key[0] for key in module._packed] == [op.name for op in PROGRAM.operations]
    before = dict(module._packed)
    engine(torch.randn(2, 3, 64, 64))
    assert module._packed == before
    x = torch.randn(1, 3, 32, 32)
    assert relative(engine(x), Engine(PROGRAM, device="cpu", executor="reference")(x)) < 1e-5
    assert len(before) < len(module._packed) < 2 * len(before), "but where fewer products suggest another algorithm"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kernel": 5},
         "a 5x5 convolution of features: FEATURE_KERNEL in kernels/cpu/shared.h allows the CPU kernels 3"),
        ({"kernel": 9, "inputs": (INPUT,), "cin": 3},
         "a 9x9 convolution of the picture: PICTURE_KERNEL in kernels/cpu/shared.h allows the CPU kernels 7"),
        ({"inputs": ("a", "a", "a"), "cin": 24},
         "3 inputs of a convolution: MOST_INPUTS in kernels/cpu/shared.h allows the CPU kernels 2"),
    ],
    ids=["features", "picture", "inputs"],
)  # fmt: skip
def test_what_is_larger_than_the_kernels_compute_is_refused(
    change: dict, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were programs allowed it, kernels would read beside the border, and write beside their arrays on the stack."""
    monkeypatch.setattr(contract, "_faults", lambda *_: ())
    level = 1 if "inputs" in change and INPUT in change["inputs"] else 2
    last = Operation("fc", "classifier", "head", None, level + 1, ("b",), 8, 10)
    b = replace(conv("b", "stem", None, level, ("a",)), **change)
    program = weightless(*([conv("a", "stem", None, 1, (INPUT,))] if level == 2 else []), b, last)
    with pytest.raises(ParNetError) as said:
        plan_of(program, (1, 3, 32, 32))
    assert said.value.args[0] == f"operation 'b': {reason}"


@pytest.mark.parametrize("streams", [1, 2, 3, 8, 24])
def test_a_classifier_of_any_number_of_features(streams: int) -> None:
    program, x = parallel_chains(24, streams, 16, 32), torch.randn(2, 3, 32, 64)
    assert relative(plan_of(program, x.shape, threads=2)(x)[0], reference(program, x)) < 1e-5
