"""The choice between executors and numbers of threads on a CPU, and OpenVINO, which it may take."""

from __future__ import annotations

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_parnet import Config, Engine, ParNetError, Placement, Program, fold
from parallel_parnet import engine as engines
from parallel_parnet.choice import on_one_lane
from parallel_parnet.cores import cores
from parallel_parnet.executors.local import LocalExecutor
from parallel_parnet.executors.making import make_backend
from small import OPTIONAL, SMALL, lively, relative
from ungated import noise, random_placement

pytest.importorskip("openvino")

from parallel_parnet.executors import openvino_model

PROGRAM = fold(lively(SMALL, 9))
X = torch.randn(1, 3, 64, 32)
EXPECTED = Engine(PROGRAM, device="cpu", executor="reference")(X)
FOUR = Config((8, 16, 32, 64, 96), blocks=(1, 2, 1, 2), num_classes=10, activation="relu")


def by_openvino(program: Program, placement: Placement | None = None, threads: int | None = None) -> Engine:
    return Engine(program, placement, "cpu", executor="openvino", threads=threads)


@pytest.fixture
def two_threads() -> None:
    torch.set_num_threads(2)


def test_candidates() -> None:
    for count, threads in ((1, [1]), (4, [4, 1])):
        found = on_one_lane(PROGRAM, count, ["openvino"])
        assert [(choice.placement.lanes, choice.threads) for choice in found] == [(1, n) for n in threads]


def test_the_same_answer_every_time() -> None:
    for threads in (1, 3):
        engine = by_openvino(PROGRAM, threads=threads)
        first = engine(X.requires_grad_())
        assert relative(first, EXPECTED) < 1e-5
        for _ in range(20):
            engine(torch.randn_like(X))
            assert torch.equal(engine(X), first), threads


def test_threads_are_as_asked_and_have_no_cores_of_their_own(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks of a host would bind theirs to the same cores."""
    compiled, compile_model = [], openvino_model.compile_model

    def kept(*args: object, **settings: object) -> object:
        compiled.append(compile_model(*args, **settings))  # type: ignore[arg-type]
        return compiled[-1]

    monkeypatch.setattr(openvino_model, "compile_model", kept)
    single = Placement.single(PROGRAM)
    for threads in (1, None):
        backend = make_backend("openvino", PROGRAM, single.segments(PROGRAM), [X.device], torch.float32, threads)
        assert relative(LocalExecutor(single, [X.device], backend)(X), EXPECTED) < 1e-5
    assert [model.get_property("INFERENCE_NUM_THREADS") for model in compiled] == [1, min(2, cores())]
    assert not any(model.get_property("ENABLE_CPU_PINNING") for model in compiled)
    monkeypatch.setitem(sys.modules, "openvino", None)
    backend = make_backend("openvino", PROGRAM, single.segments(PROGRAM), [X.device], torch.float32)
    with pytest.raises(ParNetError, match=r"openvino cannot be loaded .*: choose native"):
        LocalExecutor(single, [X.device], backend)(X)


@settings(max_examples=3, deadline=None)
@given(st.data(), st.integers(2, 3))
def test_any_placement(data: st.DataObject, lanes: int) -> None:
    engine = by_openvino(PROGRAM, random_placement(PROGRAM, lanes, data.draw), 1)
    for x in noise(data.draw, 3, 2, 3, 32, 32):
        assert relative(engine(x), Engine(PROGRAM, device="cpu", executor="reference")(x)) < 1e-5


def test_another_network_of_four_streams() -> None:
    program = fold(lively(FOUR, 0))
    side = program.size_multiple
    for lanes in (1, 2):
        engine = by_openvino(program, Placement.by_streams(program, lanes))
        x = torch.randn(2, 3, side, side)
        assert relative(engine(x), Engine(program, device="cpu", executor="reference")(x)) < 1e-5


def test_threads_take_turns(two_threads: None) -> None:
    engine = Engine(PROGRAM, Placement.by_streams(PROGRAM, 2), "cpu", executor="openvino")
    pictures = [torch.randn(1, 3, 32, 32) for _ in range(30)]
    reference = Engine(PROGRAM, device="cpu", executor="reference")
    with ThreadPoolExecutor(4) as threads:
        for got, x in zip(threads.map(engine, pictures), pictures, strict=True):
            assert relative(got, reference(x)) < 1e-5


def test_warm_up_chooses_once_and_the_choice_is_kept(tmp_path: Path, two_threads: None) -> None:
    engine = Engine(PROGRAM, device="cpu")
    seconds = engine.warm_up(X)
    assert len(seconds) == 2 * len(OPTIONAL) and list(seconds.values()) == sorted(seconds.values())
    assert f"{engine.placement.lanes} lane(s) of {engine.threads} thread(s)" in next(iter(seconds))
    answer = engine(X)
    assert relative(answer, EXPECTED) < 1e-5
    assert engine.warm_up(X) == {}, "there is nothing left to choose"
    engine.save(tmp_path / "e.safetensors")
    loaded = Engine.load(tmp_path / "e.safetensors", "cpu")
    assert loaded.placement == engine.placement and loaded.threads == engine.threads
    assert torch.equal(loaded(X), answer)
    assert loaded.warm_up(X) == {}
    torch.set_num_threads(1)
    elsewhere = Engine.load(tmp_path / "e.safetensors", "cpu")
    assert elsewhere.placement.lanes == 1 and elsewhere.threads is None
    assert elsewhere.warm_up(X), "measured anew on a machine with other cores"
    torch.set_num_threads(2)
    by_stream = Placement.by_streams(PROGRAM, 3)
    program, metadata = Program.read(tmp_path / "e.safetensors")
    saved = json.loads(metadata["engine"]) | {"executor": "auto", "gpu": "GPU A, driver 1", "cores": None}
    program.save(tmp_path / "g.safetensors", {"engine": json.dumps(saved | {"placement": asdict(by_stream)})})
    elsewhere = Engine.load(tmp_path / "g.safetensors", "cpu")
    assert elsewhere.placement.lanes == 1 and elsewhere.warm_up(X), "what a GPU was measured with says nothing here"


def test_candidates_run_on_the_threads_that_they_stand_for(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make_executor = [], engines.make_executor

    def kept(executor: str, program: Program, placement: Placement, *rest: Any) -> object:
        made.append(f"{executor} {placement.lanes} lane(s) of {rest[2]} thread(s)")
        return make_executor(executor, program, placement, *rest)

    monkeypatch.setattr(engines, "make_executor", kept)
    tried = [name.split(", ") for name in Engine(PROGRAM, None, "cpu").warm_up(X)]
    assert {f"{executor} {lanes}" for executor, _, lanes in tried} == {*made}


@pytest.mark.skipif("native" not in OPTIONAL, reason="the CPU kernels were not compiled")
def test_another_executor_may_win(tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def third(runs: list) -> list[float]:
        for run in runs:
            assert relative(run(), EXPECTED) < 1e-5
        return [3.0, 4.0, 1.0, 2.0]  # native with two threads and with one, then OpenVINO

    monkeypatch.setattr("parallel_parnet.choice.measure", third)
    engine = Engine(PROGRAM, None, "cpu")
    assert engine.executor == "native"
    tried = list(engine.warm_up(X))
    assert tried[0] == "openvino, whole, 1 lane(s) of 2 thread(s)"
    assert (engine.executor, engine.threads) == ("openvino", 2)
    answer, path = engine(X), tmp_path / "e.safetensors"
    engine.save(path)
    loaded = Engine.load(path, "cpu")
    assert loaded.executor == "openvino" and torch.equal(loaded(X), answer)
    loaded.save(path)
    monkeypatch.setattr("parallel_parnet.saved.lacking", lambda executor: executor == "openvino" and "it")
    without = Engine.load(path, "cpu")
    assert (without.executor, without.threads) == ("native", None), "what was chosen, not asked for, may be left out"


def test_the_callers_random_sequence_stays_where_it_is(two_threads: None) -> None:
    random.seed(0)
    expected = random.random()
    random.seed(0)
    assert len(Engine(fold(lively(SMALL, 1)), device="cpu").warm_up(torch.randn(1, 3, 32, 32))) > 1
    assert random.random() == expected


def test_one_core_has_one_way_for_each_executor() -> None:
    torch.set_num_threads(1)
    assert len(Engine(PROGRAM, None, "cpu").warm_up(X)) == len(OPTIONAL)


def test_what_was_asked_for_is_not_chosen() -> None:
    single = Placement.single(PROGRAM)
    for engine in (
        Engine(PROGRAM, single, "cpu"),
        Engine(PROGRAM, None, "cpu", executor="openvino"),
        Engine(PROGRAM, None, "cpu", executor="eager"),
        Engine(PROGRAM, None, "cpu", threads=1),
    ):
        assert engine.warm_up(X) == {}
        assert engine.placement.lanes == 1
