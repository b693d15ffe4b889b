"""What "auto" does on a GPU: candidates that fail, are wrong or slow lose, and a verdict holds where it was made."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pynvml
import pytest
import torch
from torch import Tensor

from parallel_parnet import Engine, ParNetError, ParNetWarning, Placement, fold, quantize, saved
from parallel_parnet import engine as engines
from parallel_parnet.choice import FIRST_ROUNDS, LEAST_ROUNDS, Choice, measure, on_gpus
from parallel_parnet.errors import warn
from parallel_parnet.executors.torch_backend import TorchBackend, without_tf32
from parallel_parnet.gpu import gpu_and_versions
from parallel_parnet.proof import prove, prove_on_all_ranks
from parallel_parnet.saved import Saved
from small import SMALL, lively

PROGRAM = fold(lively(SMALL, 12))
CPU = torch.device("cpu")
X = torch.randn(2, 3, 32, 32)
EAGER = Engine(PROGRAM, None, CPU, executor="eager")


def candidate(kind: str) -> Callable[[Tensor], Tensor]:
    """What runs an executor, by what is the matter with it."""
    if kind == "does not compile":
        raise RuntimeError("CompilationError: out of shared memory\nand a page of code")

    def run(x: Tensor) -> Tensor:
        if kind == "fails":
            raise ValueError
        if kind == "slow":
            time.sleep(0.3)
        return EAGER(x) * {"wrong": 1.001, "not a number": float("nan")}.get(kind, 1.0)

    return run


def make(choice: Choice, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    return candidate(choice.name)


def proved(*kinds: str, dtype: torch.dtype = torch.float32, x: Tensor = X) -> tuple[list[str], list[str]]:
    choices = [Choice("triton", Placement.single(PROGRAM), None, kind) for kind in kinds]
    rows, lines = prove(PROGRAM, choices, make, x, dtype, lambda: None, 0.05)
    return [choice.name for _, choice, _ in rows], lines


def test_the_fastest_that_agrees_wins() -> None:
    names, lines = proved("slow", "wrong", "does not compile", "fast", "not a number", "fails")
    assert names == ["fast", "slow"]
    assert lines == [
        "triton, wrong, 1 lane(s): its answer is off by 1.0e-03, of which rounding explains 1.0e-05",
        "triton, does not compile, 1 lane(s): RuntimeError: CompilationError: out of shared memory",
        "triton, not a number, 1 lane(s): its answer is off by inf, of which rounding explains 1.0e-05",
        "triton, fails, 1 lane(s): ValueError: ",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_that_are_no_numbers_prove_nothing(value: float, dtype: torch.dtype) -> None:
    """Noise does, and the answer to them is that of what it chose."""
    x = X.clone()
    x[0, 0, 3, 3] = value
    names, lines = proved("wrong", "fast", dtype=dtype, x=x)
    assert names == ["fast"] and re.fullmatch("triton, wrong, .* is off by 1.0e-03, of which .*", "".join(lines))
    assert not EAGER(x)[0].isfinite().all() and EAGER(x)[1].isfinite().all()


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_to_be_an_error_drops_no_candidate() -> None:
    """Else a GPU without tuned tiles would run torch's operations, and the reason would be past after one call."""

    def make(choice: Choice, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
        if choice.executor == "triton":
            warnings.warn("no tuned kernels for GPU A", stacklevel=2)
        return EAGER

    choices = [Choice(name, Placement.single(PROGRAM), None, "whole") for name in ("triton", "eager")]
    with pytest.raises(UserWarning, match="no tuned kernels for GPU A"):
        prove(PROGRAM, choices, make, X, torch.float32, lambda: None, 0.0)


def test_the_reference_may_lack_memory() -> None:
    def make(choice: Choice, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(ParNetError, match=r"out of memory: .*: name an executor, or call warm_up with fewer pictures"):
        prove(PROGRAM, [], make, X, torch.float32, lambda: None, 0.0)


def test_the_fastest_wins_and_the_hopeless_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: a busy machine's sleeps are hopeless now and then."""
    runs, now = [0, 0, 0], [0.0]
    monkeypatch.setattr("parallel_parnet.choice.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def run(i: int, seconds: float) -> None:
        runs[i] += 1
        now[0] += seconds

    found = measure([lambda: run(0, 0.02), lambda: run(1, 0.002), lambda: run(2, 0.0021)])
    assert found[0] > found[1] and found[0] > found[2]
    assert runs[0] == FIRST_ROUNDS and runs[1] == runs[2] > LEAST_ROUNDS


def test_rounds_differ_in_their_order_and_end_where_they_are_enough() -> None:
    order: list[int] = []
    measure([partial(order.append, i) for i in range(8)])
    assert len({tuple(order[8 * i : 8 * i + 8]) for i in range(FIRST_ROUNDS)}) > 1
    order.clear()
    measure([lambda: order.append(time.sleep(1e-3) or 0)], enough=0.0)
    assert len(order) == LEAST_ROUNDS


def test_nothing_is_left() -> None:
    with pytest.raises(ParNetError, match="no executor can be had: triton, wrong"):
        proved("wrong", "fails")


def test_in_half_precision_torch_sets_the_limit() -> None:
    """This eager run is exact, so that only rounding to fp32 is borne."""
    assert proved("wrong", "fast", dtype=torch.bfloat16)[0] == ["fast"]


def test_what_rounds_as_torch_does_is_timed_to_the_devices_end() -> None:
    rounding, waited = Engine(PROGRAM, None, CPU, torch.bfloat16, "eager"), []

    def make(choice: Choice, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
        return EAGER if dtype == torch.float32 else rounding

    choice = Choice("triton", Placement.single(PROGRAM), None, "rounds")
    rows, lines = prove(PROGRAM, [choice], make, X, torch.bfloat16, lambda: waited.append(None), 0.0)
    assert [row[1] for row in rows] == [choice] and not lines
    assert len(waited) == LEAST_ROUNDS


def test_candidates() -> None:
    by_stream = Placement.by_streams(PROGRAM, 3)
    names = [str(choice) for choice in on_gpus(PROGRAM, None)]
    assert names == [
        "cuda_graph, whole, 1 lane(s)", "triton, whole, 1 lane(s)", "eager, whole, 1 lane(s)",
        "cuda_graph, by stream, 3 lane(s)", "cuda_streams, by stream, 3 lane(s)",
    ]  # fmt: skip
    assert {choice.placement.lanes for choice in on_gpus(PROGRAM, by_stream)} == {3}


@pytest.mark.parametrize(
    ("kind", "others", "executor", "line"),
    [
        ("fast", [0, 0], "cuda_graph", ""),
        ("fast", [1, 0], "eager", "executor eager runs, since rank 1 cannot have cuda_graph"),
        ("wrong", [0, 0], "eager", "no executor can be had: cuda_graph, .* is off by 1.0e-03, .* explains 1.0e-05"),
    ],
)
def test_ranks_agree(kind: str, others: list[int], executor: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(choice: Choice, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
        return candidate(kind if choice.executor == "cuda_graph" else "fast")

    monkeypatch.setattr("parallel_parnet.proof.gather", lambda numbers: [numbers, *([n] for n in others)])
    found, lines = prove_on_all_ranks(PROGRAM, make, CPU, torch.float32, lambda: None)
    assert found == executor and re.fullmatch(line, "\n".join(lines)), lines


def pretend(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    """This GPU in the CPU's place, for engines and for what their files say."""
    for module in (engines, saved):
        monkeypatch.setattr(module, "gpu_and_versions", lambda device: gpu)
        monkeypatch.setattr(module, "lives_on_gpu", lambda device: True)


def test_the_verdict_is_saved_for_its_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's own way through it all, with the CPU in the GPU's place."""
    pretend(monkeypatch, "GPU A, driver 1")
    names, single = ("eager", "reference"), Placement.single(PROGRAM)
    choices = [Choice(executor, single, None, "whole") for executor in names]
    monkeypatch.setattr(engines, "on_gpus", lambda program, placement: choices)
    engine, path = Engine(PROGRAM, None, "cpu"), tmp_path / "e.safetensors"
    first = engine(X)
    assert engine.executor in names and engine.warm_up(X) == {}, "the first call has proved it"
    engine.save(path)
    again = Engine.load(path, "cpu")
    assert again.executor == engine.executor and not again._unproved
    assert torch.equal(again(X), first)
    pretend(monkeypatch, "GPU A, driver 2")
    elsewhere = Engine.load(path, "cpu")
    assert elsewhere._unproved and elsewhere.warm_up(X), "asked anew"


@pytest.mark.parametrize(("gpu", "quantised", "holds"), [
    ("GPU A, driver 1", False, True), ("GPU A, driver 1", True, False), ("GPU A, driver unknown", False, False),
])  # fmt: skip
def test_a_saved_verdict_is_of_a_known_driver_and_of_what_was_proved(
    gpu: str, quantised: bool, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two drivers that nobody tells may differ, and quantised programs are not proved."""
    pretend(monkeypatch, gpu)
    verdict = Saved(torch.float32, "auto", "eager", None, None, None, gpu)
    assert verdict.holds_on(CPU, quantize(PROGRAM, X) if quantised else PROGRAM) == holds


def test_first_calls_of_several_threads_prove_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU two proofs at a time would break each other's captures."""
    monkeypatch.setattr(engines, "lives_on_gpu", lambda device: True)
    warn.cache_clear()
    engine, proofs = Engine(PROGRAM, None, "cpu"), []

    def slowly(*arguments: Any) -> tuple[list, list[str]]:
        proofs.append(get_ident())
        time.sleep(0.2)
        choice = Choice("eager", Placement.single(PROGRAM), None, "whole")
        return [(1.0, choice, engine._made(choice, None))], ["triton: left out"]

    monkeypatch.setattr(engines, "prove", slowly)
    with ThreadPoolExecutor(4) as threads, pytest.warns(ParNetWarning, match="triton: left out"):
        answers = list(threads.map(engine, [X] * 4))
    assert len(proofs) == 1 and all(torch.equal(answer, answers[0]) for answer in answers)


def test_a_driver_that_nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU A")
    monkeypatch.setattr(pynvml, "nvmlInit", Mock(side_effect=pynvml.NVMLError_LibraryNotFound()))
    assert gpu_and_versions(CPU).startswith("GPU A, driver unknown, torch ")


def test_quantised_programs_have_nothing_to_prove(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch alone computes them there without being asked."""
    monkeypatch.setattr(engines, "lives_on_gpu", lambda device: True)
    monkeypatch.setattr(engines, "prove", lambda *_: pytest.fail("proved"))
    engine = Engine(quantize(PROGRAM, X), Placement.single(PROGRAM), "cpu")
    assert engine.warm_up(X) == {} and engine(X).shape == (2, 10)


def test_a_placement_that_was_given_holds_on_another_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two loads, each of which measures anew."""
    pretend(monkeypatch, "GPU A")
    monkeypatch.setattr(engines, "on_gpus", lambda program, placement: [Choice("eager", placement, None, "as placed")])
    given, path = Placement.by_streams(PROGRAM, 3), tmp_path / "e.safetensors"
    engine = Engine(PROGRAM, given, "cpu")
    for gpu in ("GPU A", "GPU B", "GPU C"):
        pretend(monkeypatch, gpu)
        assert engine.warm_up(X), "asked anew"
        engine.save(path)
        again = Engine.load(path, "cpu")
        assert again.placement == given and not again._unproved
        again.save(path)
        pretend(monkeypatch, "elsewhere")
        engine = Engine.load(path, "cpu")
        assert engine.placement == given and engine._unproved


def test_tf32_is_left_out_and_comes_back() -> None:
    """Whichever of torch's two ways to say it the caller took: reading one raises where the other was left changed."""
    conv, product = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before, inside = (conv.fp32_precision, product.fp32_precision), []

    def work() -> None:
        with without_tf32:
            inside.extend([conv.fp32_precision, product.fp32_precision])
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert inside == ["ieee", "ieee"]
    assert (conv.fp32_precision, product.fp32_precision) == before
    assert torch.backends.cudnn.allow_tf32 in (True, False), "can be read"


@pytest.mark.parametrize(
    ("device", "dtype", "left_out"),
    [("cuda", torch.float32, True), ("cuda", torch.bfloat16, False), ("cpu", torch.float32, False)],
)
def test_torch_computes_fp32_on_a_gpu_without_tf32(device: str, dtype: torch.dtype, left_out: bool) -> None:
    single = Placement.single(PROGRAM)
    backend = TorchBackend("eager", PROGRAM, single.segments(PROGRAM), [CPU], dtype)
    picture: Any = SimpleNamespace(device=torch.device(device))
    runner = backend.bind(single.segments(PROGRAM)[0], (2, 32, 32), (picture,), {})
    assert (runner.within is without_tf32) == left_out
