"""This project's executors as contenders."""

from __future__ import annotations

import torch

from parallel_parnet import Engine, ParNetError, quantize
from parallel_parnet.executors.available import EXECUTORS, choose_executor
from parallel_parnet.program.contract import dtype_name

from .peer_torch import emulated
from .subject import Contender, Runner, Subject, on_device

IN_INT8 = ("auto", "native")  # the others compute a quantised program's integers as fp32 numbers, to check it


def ours(dtype: torch.dtype) -> list[Contender]:
    """Every executor that the engine knows for a type; those that are another's second name give way to it.

    "ours: auto" is the engine after `warm_up`, where that has something to choose.
    """
    names = IN_INT8 if dtype == torch.int8 else EXECUTORS
    return [Contender(f"ours: {name}", True, lambda subject, name=name: _build(subject, name)) for name in names]


def usual(subject: Subject) -> str:
    """The contender by what the engine chooses; on a GPU by our kernels in a CUDA graph, as peers run in graphs."""
    device, dtype = subject.device, subject.dtype
    return f"ours: {'cuda_graph' if device.type == 'cuda' else choose_executor('auto', device, dtype)}"


def engine_of(subject: Subject, executor: str) -> Engine:
    """Of the network in its type; for int8 quantised by the subject's pictures."""
    program, dtype = subject.program, subject.dtype
    if dtype == torch.int8:
        program, dtype = quantize(program, subject.calibration), torch.float32
    return Engine(program, device=subject.device, dtype=dtype, executor=executor)


def _build(subject: Subject, name: str) -> Runner:
    engine = engine_of(subject, name)
    chosen = engine.warm_up(subject.pictures(1)[0]) if name == "auto" else {}
    if engine.executor != name and not chosen:
        raise ParNetError(f"another name for {engine.executor} here")
    plain = f"executor {name}, {subject.threads} thread(s)" if subject.device.type == "cpu" else name
    settings = next(iter(chosen), plain)
    is_emulated = engine.arithmetic == subject.dtype and emulated(subject)
    arithmetic = dtype_name(engine.arithmetic) + (", emulated" if is_emulated else "")
    return Runner(engine, settings, arithmetic, wait=on_device(subject))
