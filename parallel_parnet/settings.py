"""What the caller has set in torch for code of his own, kept out of the engine's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import Lock
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

AUTOCAST = ("cpu", "cuda")
_filters = Lock()


def with_own_settings(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function without its caller's autocast, default device and inference mode: none of them may round weights,
    move buffers, or decide what can be done with an answer.

    The default type belongs to the whole process and not to a thread, so that it cannot be kept out: whatever
    allocates says its type and device. tests/test_settings.py looks after both.
    """

    @wraps(function)
    def inner(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        rounds = [kind for kind in AUTOCAST if torch.is_autocast_enabled(kind)]
        # a default device is such a mode; without one nothing is allocated to ask
        moves = torch._C._len_torch_function_stack() and torch.empty(0, dtype=torch.uint8).device.type != "cpu"
        if not (rounds or moves or torch.is_inference_mode_enabled()):
            return function(*args, **kwargs)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for kind in rounds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            if moves:
                stack.enter_context(torch.device("cpu"))
            return function(*args, **kwargs)

    return inner


@contextmanager
def without_warnings(category: type[Warning] = Warning) -> Iterator[None]:
    """One thread at a time: filters are the whole process's, and of two threads that change them for a while the one
    that leaves last would keep the other's for good."""
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield
