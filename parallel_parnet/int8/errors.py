"""What int8 and fp8 cost in accuracy: of a whole program, and of each of its operations alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from ..engine import Engine
from ..errors import ParNetError
from ..program.placement import Placement
from ..program.program import Program
from ..settings import with_own_settings
from .kernels import quantisable_operations
from .samples import some_at_a_time


@with_own_settings
def errors_alone(
    program: Program, make: Callable[[Collection[str]], Program], pictures: Iterable[Tensor] | Tensor
) -> dict[str, float]:
    """Return the error of the answers where one operation alone is quantised, with the features that it reads, for each
    that can be, in program order; see `errors`. make: the quantised program, given the names of what is to stay in
    fp32."""
    names = [op.name for op in quantisable_operations(program)]
    alone = {name: make([other for other in names if other != name]) for name in names}
    return errors(alone, program, pictures)


@with_own_settings
def errors(others: Mapping[str, Program], exact: Program, pictures: Iterable[Tensor] | Tensor) -> dict[str, float]:
    """Return how far each of the other programs is from `exact`, by its name: |difference| / |exact| of the logits of
    all pictures together, or of the worst of the outputs, by the executor reference. Pictures as of `quantize`."""
    engines: dict[str | None, Engine] = {}
    off = {name: torch.zeros(len(exact.answers), dtype=torch.float64, device="cpu") for name in others}
    size = torch.zeros(len(exact.answers), dtype=torch.float64, device="cpu")

    def answers(name: str | None, program: Program, x_nchw: Tensor) -> list[Tensor]:
        if name not in engines:
            engines[name] = Engine(program, Placement.single(program), x_nchw.device, executor="reference")
        answer = engines[name](x_nchw)
        return [answer] if isinstance(answer, Tensor) else list(answer.values())

    for x_nchw in some_at_a_time(pictures):
        expected = answers(None, exact, x_nchw)
        size += _squares(expected)
        for name, program in others.items():
            got = answers(name, program, x_nchw)
            off[name] += _squares([a - b for a, b in zip(got, expected, strict=True)])
    if not engines:
        raise ParNetError("no pictures to compare answers on: give some")
    return {name: (squares / size).sqrt().max().item() for name, squares in off.items()}


def _squares(tensors: list[Tensor]) -> Tensor:
    """Sum the squares of each tensor, float64 [tensors]."""
    return torch.stack([tensor.double().square().sum().cpu() for tensor in tensors])
