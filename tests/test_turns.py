"""Calls of an engine that come while it is in a call of the same thread."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

import pytest
import torch

from conftest import ROOT
from parallel_parnet import Engine, ParNetError, fold
from small import OPTIONAL, SMALL, lively

PROGRAM = fold(lively(SMALL, 2))
X = torch.randn(1, 3, 32, 32)


class Stack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.mark.skipif("openvino" not in OPTIONAL, reason="needs OpenVINO")
def test_the_stack_for_signals_goes_with_no_engine() -> None:
    """OpenVINO's went with the engine, and the next signal that Python handles crashed the process."""

    def stack() -> int:
        found = Stack()
        assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
        return found.start

    engines, stacks = [], []
    for _ in range(3):
        engines.append(Engine(PROGRAM, device="cpu", executor="openvino"))
        engines[-1](X)
        stacks.append(stack())
    assert len(set(stacks)) == 1


@pytest.mark.parametrize("executor", ["eager", *OPTIONAL])
def test_a_signal_handler_calls_what_it_interrupts(executor: str) -> None:
    """In a process of its own: where another library has taken the stack for signals away, any would crash it."""
    beside = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, __file__, executor]
    done = subprocess.run(command, env=beside, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def interrupt(executor: str) -> None:
    """The handler hears of it, rather than wait for ever; other engines, and this one between two calls, answer it."""
    engine, other = (Engine(PROGRAM, device="cpu", executor=executor) for _ in range(2))
    expected, told = engine(X), set[str]()

    def handler(number: int, frame: FrameType | None) -> None:
        assert torch.equal(other(X), expected)
        try:
            assert torch.equal(engine(X), expected)
        except ParNetError as error:
            told.add(str(error))
        if not told:
            signal.setitimer(signal.ITIMER_REAL, 0.01)

    other(X)
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while not told:
        assert torch.equal(engine(X), expected)
    assert told == {
        "an engine called from within its own call, as a signal handler or a finalizer may: call it after that"
    }


if __name__ == "__main__":
    interrupt(sys.argv[1])
