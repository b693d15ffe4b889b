"""What the caller has set for code of his own, kept out of the engine's, and what the engine's sets, out of his."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from threading import RLock, get_ident
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

AUTOCAST = ("cpu", "cuda")
# looked up once, since every call asks: whether a transform of torch.func, such as vmap or grad, is to see what is done
# with a tensor; which one the caller is in; and what watches, records or fakes operations, in their dispatch or before
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
innermost_transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack
watchers: Callable[[], int] = torch._C._len_torch_dispatch_stack
is_included, BEFORE = torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch
is_traced: Callable[[], bool] = torch._C._is_tracing
modes: Callable[[], int] = torch._C._len_torch_function_stack
in_inference_mode: Callable[[], bool] = torch.is_inference_mode_enabled


class Together:
    """A context that changes what belongs to the whole process, for any number of threads at a time.

    The first to come in makes the change and the last to leave takes it back. If each did both, one would take it back
    while others rely on it, and the last would leave the process with what the first had set. Counting is of the
    process, as what it guards is: there is one for each setting, at the level of a module.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change, self._lock = change, RLock()  # a signal handler may come in while its thread does
        self._inside: list[int] = []  # threads
        self._made: list[AbstractContextManager[object]] = []
        os.register_at_fork(
            before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._in_child
        )

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                made = self._change()
                made.__enter__()
                self._made.append(made)
            self._inside.append(get_ident())

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside.remove(get_ident())
            if not self._inside:
                self._made.pop().__exit__(None, None, None)

    def _in_child(self) -> None:
        """Forget the other threads: only the one that forked is here, and it may be inside itself."""
        before, self._inside = self._inside, [thread for thread in self._inside if thread == get_ident()]
        if before and not self._inside:
            self._made.pop().__exit__(None, None, None)
        self._lock.release()


@Together
@contextmanager
def quiet() -> Iterator[None]:
    """Show no warnings, whoever raises them, while inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def with_own_settings(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function to run without its caller's autocast, default device, inference mode and torch.func: none of
    them may round weights, move or wrap buffers, or decide what can be done with an answer. torch.compile leaves it
    alone: it would trace all that prepares a call, for a minute.

    The default type belongs to the whole process and not to a thread, so that it cannot be kept out: whatever
    allocates says its type and device. tests/test_settings.py looks after both.
    """

    @wraps(function)
    def inner(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        rounds = [kind for kind in AUTOCAST if torch.is_autocast_enabled(kind)]
        # a default device is such a mode; without one nothing is allocated to ask
        moves = modes() and torch.empty(0, dtype=torch.uint8).device.type != "cpu"
        wrapped = innermost_transform() is not None
        if not (rounds or moves or wrapped or in_inference_mode()):
            return function(*args, **kwargs)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for kind in rounds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            if moves:
                stack.enter_context(torch.device("cpu"))
            if wrapped:
                stack.enter_context(temporarily_clear_interpreter_stack())
            return function(*args, **kwargs)

    return inner


def outside_torch_modes(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function to run outside all that watches, records or fakes torch's operations: what it makes is kept
    beyond them, so it must hold numbers."""

    @wraps(function)
    def inner(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not is_watched():
            return function(*args, **kwargs)
        with _disable_current_modes():
            return function(*args, **kwargs)

    return inner


def interferes() -> bool:
    """Whether what the caller has set could see, change or forbid a call that only allocates its answer: a recorder or
    a mode of torch. Autocast and transforms of torch.func could not."""
    return is_traced() or is_watched() or modes() > 0


def is_watched() -> bool:
    """Whether something watches, records or fakes torch's operations."""
    return watchers() > 0 or is_included(BEFORE)
