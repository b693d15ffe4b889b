"""Calls of an engine that come while it is in a call of the same thread."""

from __future__ import annotations

import signal
import time
from types import FrameType

import pytest
import torch

from parallel_parnet import Engine, ParNetError, fold
from small import OPTIONAL, SMALL, lively

PROGRAM = fold(lively(SMALL, 2))
X = torch.randn(1, 3, 32, 32)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("executor", ["eager", *OPTIONAL])
def test_a_signal_handler_calls_what_it_interrupts(executor: str) -> None:
    """It hears of it, rather than wait for ever; other engines, and this one between two calls, answer it."""
    engine, other = (Engine(PROGRAM, device="cpu", executor=executor) for _ in range(2))
    expected, told = engine(X), set[str]()

    def handler(number: int, frame: FrameType | None) -> None:
        assert torch.equal(other(X), expected)
        try:
            assert torch.equal(engine(X), expected)
        except ParNetError as error:
            told.add(str(error))
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    other(X)
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        deadline = time.monotonic() + 20
        while not told:
            assert time.monotonic() < deadline
            assert torch.equal(engine(X), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert told == {
        "an engine called from within its own call, as a signal handler or a finalizer may: call it after that"
    }
