"""What a call gives: logits, or a program's outputs by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ParNetError
from ..parity import relative
from ..program.program import Program
from ..settings import is_wrapped
from .binding import NHW, Backend

Answer = Tensor | dict[str, Tensor]


def answers_from(program: Program, feature: Callable[[str], Tensor]) -> Answer:
    """Return a program's answer: its logits, or its outputs by name.

    feature: gives the tensor that an operation makes, by the operation's name.
    """
    if not program.outputs:
        return feature(program.output)
    return {name: feature(made) for name, made in program.outputs.items()}


def answers_from_messages(backend: Backend, nhw: NHW, feature: Callable[[str], Tensor]) -> Answer:
    """Return a program's answer from features as they cross lanes, whose layout the backend knows.

    nhw: number, height and width of the pictures. feature: gives an operation's message, by the operation's name.
    """
    return answers_from(backend.program, lambda name: backend.nchw(name, feature(name), nhw))


def each(answer: Answer, change: Callable[[Tensor], Tensor]) -> Answer:
    """Return the answer with `change` applied to each of its tensors."""
    return change(answer) if isinstance(answer, Tensor) else {name: change(tensor) for name, tensor in answer.items()}


def copied(tensor: Tensor) -> Tensor:
    """Return a copy in memory of its own; on the CPU by numpy, in this thread: torch's threads, once awake, spin on the
    cores of the kernels'."""
    return torch.from_numpy(tensor.numpy().copy(order="K")) if tensor.is_cpu else tensor.clone()


def logits_of(answer: Answer) -> Tensor:
    """Return an answer that is logits; ParNetError where it is outputs by name, which nothing fills in place."""
    if not isinstance(answer, Tensor):
        raise ParNetError(f"out and buffers are for logits; this program gives {', '.join(answer)}: leave them out")
    return answer


def fill(out: Tensor, answer: Answer) -> Tensor:
    """Return `out`, filled with an answer that is logits."""
    with torch.inference_mode():  # which alone fills an `out` that was made in it
        return out.copy_(logits_of(answer))


def check_out(program: Program, x_nchw: Tensor, out: Tensor) -> None:
    """Raise ParNetError where `out` cannot take the logits of such pictures: fp32 [N, classes], on their device."""
    if program.outputs:
        raise ParNetError(f"out is for logits, and this program gives {', '.join(program.outputs)}: leave it out")
    if not isinstance(out, Tensor) or out.layout != torch.strided or is_wrapped(out) or _shares_places(out):
        raise ParNetError(f"out, a {type(out).__name__}: expected a dense tensor whose elements do not overlap")
    if out.requires_grad:
        raise ParNetError("out requires gradients, which an engine has none of: give its detach()")
    expected = x_nchw.shape[0], program.operations[-1].cout
    if out.shape != expected or out.dtype != torch.float32 or out.device != x_nchw.device:
        raise ParNetError(
            f"out {list(out.shape)} of {out.dtype} on {out.device}: expected {list(expected)} of float32 on "
            f"{x_nchw.device}"
        )


def _shares_places(out: Tensor) -> bool:
    """Whether an element may lie where another does."""
    reach = 0
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def largest_error(got: Answer, expected: Answer) -> float:
    """Return the largest of the relative errors of an answer's tensors; see `parity.relative`."""
    if isinstance(got, Tensor) and isinstance(expected, Tensor):
        return relative(got, expected)
    assert isinstance(got, dict) and isinstance(expected, dict)
    return max(relative(got[name], tensor) for name, tensor in expected.items())
