"""Programs with several outputs: each executor's features are those of its whole network, bit for bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel_parnet import Backbone, Config, Engine, ParNetError, Placement, Program, fold
from parallel_parnet.executors.graph import GraphExecutor
from parallel_parnet.executors.local import LocalExecutor
from parallel_parnet.executors.torch_backend import TorchBackend
from small import OPTIONAL, SMALL, lively, relative
from standins import RandomQueues, graph
from ungated import random_placement

CPU = torch.device("cpu")
MODEL = lively(SMALL, 5)
ALL = ("streams.0", "streams.1", "streams.2", "fused", "logits")
WHOLE, PLAIN = fold(MODEL, outputs=ALL), fold(MODEL)
X = torch.randn(2, 3, 64, 96)
EXECUTORS = ["reference", "eager", *OPTIONAL]


def run(program: Program, executor: str, x: Tensor = X, **settings: object) -> dict[str, Tensor]:
    answer = Engine(program, device="cpu", executor=executor, **settings)(x)  # type: ignore[arg-type]
    assert isinstance(answer, dict)
    return answer


@cache
def whole_by(executor: str) -> dict[str, Tensor]:
    return run(WHOLE, executor)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_features_are_the_models(executor: str) -> None:
    got = run(WHOLE, executor)
    assert list(got) == list(ALL)
    info = MODEL.feature_info
    with torch.no_grad():
        expected = [*Backbone(MODEL)(X), MODEL(X)]
    for name, tensor, wanted in zip(ALL, got.values(), expected, strict=True):
        assert tensor.dtype == torch.float32 and tensor.shape == wanted.shape
        assert relative(tensor, wanted) < 1e-5, name
    for name, channels, reduction in zip(info.module_name(), info.channels(), info.reduction(), strict=True):
        assert got[name].shape == (2, channels, 64 // reduction, 96 // reduction)
    assert torch.equal(got["logits"], Engine(PLAIN, device="cpu", executor=executor)(X))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_some_outputs_are_those_of_all(executor: str) -> None:
    whole = whole_by(executor)
    for names in [*((name,) for name in ALL), ("streams.0", "streams.2"), ALL[:4]]:
        for name, tensor in run(fold(MODEL, outputs=names), executor).items():
            assert torch.equal(tensor, whole[name]), (names, name)


def test_what_nothing_needs_is_left_out() -> None:
    program = fold(MODEL, outputs=("streams.1",))
    assert {op.name.split(".")[0] for op in program.operations} == {"inits", "streams"}
    assert program.streams == 1 and len(program.operations) == 3 + 5
    assert fold(Backbone(MODEL, (0, 3))).outputs == {"streams.0": "streams.0.3", "fused": "combine.3"}


@pytest.mark.parametrize("executor", [name for name in EXECUTORS if name != "reference"])
@settings(max_examples=8, deadline=None)
@given(st.data(), st.integers(1, 3), st.sets(st.sampled_from(ALL), min_size=1))
def test_lanes(executor: str, data: st.DataObject, lanes: int, names: set[str]) -> None:
    program, whole = fold(MODEL, outputs=tuple(names)), whole_by(executor)
    placement = random_placement(program, lanes, data.draw)
    answer = run(program, executor, placement=placement)
    assert all(relative(answer[name], whole[name]) < 1e-5 for name in names)
    if executor == "eager":  # others cut their work, and sum, by what a lane has beside it
        assert all(torch.equal(answer[name], whole[name]) for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_pictures_and_half_precision(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    engine, plain = (Engine(p, device="cpu", executor="eager", dtype=dtype) for p in (WHOLE, PLAIN))
    assert torch.equal(engine(raw)["logits"], plain(raw))
    first, kept = engine(raw), {name: tensor.clone() for name, tensor in engine(raw).items()}
    engine(255 - raw)
    assert all(torch.equal(first[name], kept[name]) for name in ALL), "answers are the caller's own"


def test_in_a_graph() -> None:
    """Forked, joined and replayed, with a stand-in for CUDA."""
    placement = Placement.by_streams(WHOLE, 3)
    backend = TorchBackend("eager", WHOLE, placement.segments(WHOLE), [CPU] * 3, torch.float32)
    executor = GraphExecutor("cuda_streams", LocalExecutor(placement, [CPU] * 3, backend, RandomQueues(1)), graph)
    for x in (X, X.flip(0)):
        got, expected = executor(x), run(WHOLE, "eager", x)
        assert all(torch.equal(got[name], expected[name]) for name in ALL)
    with pytest.raises(ParNetError, match=r"buffers are for logits; this program gives streams.0, "):
        executor.buffers(X.shape)


@pytest.mark.parametrize("executor", ["auto", *EXECUTORS])
def test_kept_in_a_file_and_warmed_up(executor: str, tmp_path: Path) -> None:
    engine = Engine(WHOLE, device="cpu", executor=executor)
    engine.warm_up(X)
    engine.save(tmp_path / "engine.safetensors")
    again, expected = Engine.load(tmp_path / "engine.safetensors", "cpu"), engine(X)
    assert again.program.digest == WHOLE.digest != PLAIN.digest
    assert all(torch.equal(again(X)[name], expected[name]) for name in ALL)
    assert [list(answer) for answer in engine.map([X, X[:1]])] == [list(ALL)] * 2


@pytest.mark.parametrize("outputs", [(), "fused", ("streams.3",), ("fused", "fused"), ("combine.3",)])
def test_outputs_that_are_not_there(outputs: tuple[str, ...]) -> None:
    with pytest.raises(ParNetError, match=r"outputs .*: (give a tuple of some of streams.0|name each once)"):
        fold(MODEL, outputs=outputs)


def test_what_fills_no_dictionary() -> None:
    with pytest.raises(ParNetError, match=r"out is for logits, and this program gives streams.0, "):
        Engine(WHOLE, device="cpu", executor="eager")(X, out=torch.empty(2, 10))


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_other_numbers_of_streams(streams: int) -> None:
    model = lively(Config((8, 16, 32, 8, 20)[: streams + 1], blocks=(1,) * streams, num_classes=3), 1)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = Backbone(model)(x)
    for got, wanted in zip(run(fold(Backbone(model)), "eager", x).values(), expected, strict=True):
        assert relative(got, wanted) < 1e-5
