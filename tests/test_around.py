"""What callers put around an engine: torch.compile, what records or fakes tensors, odd memory, broken libraries."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.masked import masked_tensor
from torch.utils.flop_counter import FlopCounterMode

from parallel_parnet import Engine, ParNetBlock, ParNetError, fold
from small import OPTIONAL, SMALL, lively, relative

PROGRAM = fold(lively(SMALL, 2))
X, OTHER = torch.randn(2, 1, 3, 32, 32)


def engine_of(executor: str) -> Engine:
    engine = Engine(PROGRAM, device="cpu", executor=executor)
    engine(X)
    return engine


@pytest.mark.parametrize("executor", ["eager", *OPTIONAL])
def test_torch_compile_leaves_an_engine_alone(executor: str) -> None:
    """Traced, it would take a minute, and each call many times as long."""
    torch._dynamo.reset()
    counters.clear()
    engine = Engine(PROGRAM, device="cpu", executor=executor)
    compiled = torch.compile(lambda x: engine(x) + 1, backend="eager")
    for x in (X, OTHER, torch.randn(2, 3, 64, 32)):
        assert torch.equal(compiled(x), engine(x) + 1)
    assert counters["frames"]["total"] < 15, counters["frames"]
    torch._dynamo.reset()


@pytest.mark.parametrize("executor", OPTIONAL)
def test_recorders_are_refused_where_there_is_nothing_to_record(executor: str) -> None:
    engine = engine_of(executor)
    for record in (
        make_fx(engine),
        make_fx(engine, pre_dispatch=True),
        lambda x: torch.jit.trace(lambda y: engine(y), x, check_trace=False),
    ):
        with pytest.raises(ParNetError, match="no operations of torch to record: choose eager"):
            record(X)


class Around(torch.nn.Module):
    """A module with an engine inside, which alone torch.export takes."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        answer = self.engine(x)
        assert isinstance(answer, Tensor)
        return answer


@pytest.mark.parametrize("called_before", [False, True])
def test_eager_can_be_recorded(called_before: bool) -> None:
    """And answers as before, though all that it has was made while torch recorded."""
    for record in (make_fx, lambda engine: torch.export.export(Around(engine), (X,)).module()):
        engine = engine_of("eager") if called_before else Engine(PROGRAM, device="cpu", executor="eager")
        recorded = record(engine)
        if record is make_fx:
            recorded = recorded(X)
        torch.testing.assert_close(recorded(OTHER), engine_of("eager")(OTHER))
        torch.testing.assert_close(engine(OTHER), engine_of("eager")(OTHER))


@pytest.mark.parametrize(
    "executor", ["reference", "eager", *OPTIONAL, pytest.param("inductor", marks=pytest.mark.long)]
)
def test_an_engine_is_not_made_of_what_watches_it(executor: str) -> None:
    """Of fake or wrapped tensors, whose address is 0: later calls would crash, or give fake answers."""
    scale, expected = torch.ones(1), engine_of("reference")(X)

    def counted(engine: Engine) -> None:
        with FlopCounterMode(display=False):
            assert relative(engine(X), expected) < 1e-5

    def faked(engine: Engine) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True), suppress(ParNetError):
            engine(X)

    for call in (
        counted,
        faked,
        lambda engine: torch.func.functionalize(lambda s: engine(X) * s)(scale),
        lambda engine: torch.func.grad(lambda s: (engine(X) * s).sum())(scale),
        lambda engine: torch.vmap(lambda s: engine(X) * s)(scale),
    ):
        for engine in (Engine(PROGRAM, device="cpu", executor=executor), engine_of(executor)):
            call(engine)
            assert type(engine(X)) is Tensor and relative(engine(X), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors is in prototype stage")
@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize(
    "executor", ["reference", "eager", *OPTIONAL, pytest.param("inductor", marks=pytest.mark.long)]
)
def test_tensors_without_memory_are_refused(executor: str, called_before: bool) -> None:
    """OpenVINO would answer with whatever its own memory holds, and torch says what no user can read."""
    engine = engine_of(executor) if called_before else Engine(PROGRAM, device="cpu", executor=executor)
    for x in (FakeTensorMode().from_tensor(X), masked_tensor(X, X > 0)):
        with pytest.raises(ParNetError, match=f"a {type(x).__name__} without memory of its own: give an ordinary"):
            engine(x)
    assert relative(engine(X), engine_of("eager")(X)) < 1e-5


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("executor", ["reference", "eager", *OPTIONAL])
def test_what_torch_func_wraps_is_refused(executor: str, called_before: bool) -> None:
    """Its derivatives would be zeros."""
    engine = engine_of(executor) if called_before else Engine(PROGRAM, device="cpu", executor=executor)
    for call in (
        lambda: torch.func.functionalize(engine)(X),
        lambda: torch.func.grad(lambda x: engine(x).sum())(X),
        lambda: torch.func.jvp(engine, (X,), (X,)),
        lambda: torch.vmap(engine)(X[None]),
    ):
        with pytest.raises(ParNetError, match=r"torch.func has wrapped, .*: leave them out"):
            call()
    with pytest.raises(ParNetError, match="expected a dense tensor whose elements do not overlap"):
        torch.func.functionalize(lambda out: engine(X, out=out))(torch.empty(1, 10))
    assert relative(engine(X), engine_of("reference")(X)) < 1e-5


@pytest.mark.parametrize("executor", ["reference", "eager", *OPTIONAL])
def test_inputs_of_another_kind_after_one_that_was_right(executor: str) -> None:
    engine = engine_of(executor)
    for x in (X.to_sparse(), X.to_mkldnn()):
        with pytest.raises(ParNetError, match="expected float32, bfloat16 or float16, normalised, or uint8; dense"):
            engine(x)
    with pytest.raises(ParNetError, match="on meta, which has no memory"):
        engine(X.to("meta"))
    engine(X)
    with pytest.raises(ParNetError, match=r"give its resolve_neg\(\)"):
        engine(torch.complex(X, X).conj().imag)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(1, 10).numpy(),
        torch.zeros(1, 10).to_sparse(),
        torch.empty(1, 1).expand(1, 10),
        torch.empty(1, 10).expand(2, 10),
        torch.empty(40).as_strided((2, 10), (1, 1)),
        torch.empty(40).as_strided((2, 10), (9, 1)),
        [0.0],
    ],
    ids=type,
)
def test_what_cannot_be_filled(out: object) -> None:
    with pytest.raises(ParNetError, match="expected a dense tensor whose elements do not overlap"):
        engine_of("eager")(X, out=out)  # type: ignore[arg-type]


@pytest.mark.parametrize("out", [torch.empty(10, 2).T, torch.empty(2, 20)[:, ::2], torch.empty(2, 10)[1:]], ids=type)
def test_what_has_gaps_or_another_order_is_filled(out: Tensor) -> None:
    x = torch.randn(len(out), *X.shape[1:])
    engine_of("eager")(x, out=out.fill_(torch.nan))
    assert torch.equal(out, engine_of("eager")(x))


@pytest.mark.parametrize("executor", ["reference", "eager", *OPTIONAL])
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_pixel_that_is_no_number_is_not_hidden(executor: str, activation: str, value: float) -> None:
    program = fold(lively(replace(SMALL, activation=activation), 3))
    x = torch.randn(1, 3, 64, 64)
    x[0, 1, 40, 9] = value
    assert not Engine(program, device="cpu", executor=executor)(x).isfinite().any()


@pytest.mark.long
def test_strides_of_one_picture_mean_nothing_to_inductor() -> None:
    engine = Engine(PROGRAM, device="cpu", executor="inductor")
    for n in range(1, 12):
        x = torch.randn(2 * n, 3, 32, 32).to(memory_format=torch.channels_last)[::n][:1].requires_grad_(n % 2 == 0)
        assert relative(engine(x), engine_of("eager")(x)) < 1e-5


@pytest.mark.skipif("openvino" not in OPTIONAL, reason="needs OpenVINO")
def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "openvino" or "openvino_" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openvino", None)
    engine = Engine(PROGRAM, device="cpu")
    engine.warm_up(X)
    assert engine.executor != "openvino" and any("openvino cannot be loaded" in note for note in engine.notes)
    with pytest.raises(ParNetError, match=r"openvino cannot be loaded .*: choose native"):
        Engine(PROGRAM, device="cpu", executor="openvino")(X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_folded_block_stands_on_its_own(dtype: torch.dtype) -> None:
    block, x = ParNetBlock(8, 16, stride=2).eval().to(dtype), torch.randn(1, 8, 8, 8, dtype=dtype)
    folded = block.fold()
    before = folded(x)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(3)
    assert torch.equal(folded(x), before)
