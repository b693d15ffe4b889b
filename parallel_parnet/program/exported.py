"""A program as torch.export has it: a graph of torch's operations, which torch alone can load and run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .arithmetic import OPERATIONS, held, pixel_affine
from .contract import INPUT

if TYPE_CHECKING:
    from .program import Operation, Program

EXAMPLE = (2, 2, 3)  # pictures, and multiples of the smallest height and width: none is 1, nor equal to another size


class ProgramModule(nn.Module):
    """Pictures [N, 3, H, W], normalised, fp32, to the answers, fp32, in the order of `program.answers`.

    raw: pictures are uint8, and normalised first.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, program: Program, raw: bool = False) -> None:
        super().__init__()
        self.operations = program.operations
        self.steps = nn.ModuleList(_Step(op, held(program, op)) for op in program.operations)
        self.answers = tuple(program.answers.values())
        self.raw = raw
        if raw:
            for name, tensor in zip(("scale", "shift"), pixel_affine(program.config, torch.device("cpu")), strict=True):
                self.register_buffer(name, tensor)

    def forward(self, x_nchw: Tensor) -> Tensor | tuple[Tensor, ...]:
        features = {INPUT: x_nchw * self.scale + self.shift if self.raw else x_nchw}
        for op, step in zip(self.operations, self.steps, strict=True):
            features[op.name] = step(*(features[name] for name in op.inputs))
        answers = tuple(features[name] for name in self.answers)
        return answers if len(answers) > 1 else answers[0]


class _Step(nn.Module):
    def __init__(self, op: Operation, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.op = op
        for name, tensor in weights.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs: Tensor) -> Tensor:
        return OPERATIONS[self.op.kind](self.op, dict(self.named_buffers()), list(inputs))


def least_side(program: Program) -> int:
    """Return the smallest side of pictures, in pixels, that an exported program takes."""
    m = program.size_multiple
    return 2 * m if m in program.reductions.values() else m


def export(program: Program, raw: bool = False) -> ExportedProgram:
    """Export `ProgramModule`, for any batch and any size that fits the program and leaves no feature a single pixel:
    torch.export takes a size of 1 for a constant."""
    m, (n, h, w) = program.size_multiple, EXAMPLE
    least = least_side(program) // m
    dtype = torch.uint8 if raw else torch.float32
    picture = torch.zeros(n, 3, h * m, w * m, dtype=dtype, device="cpu")
    sizes = {0: Dim("batch"), 2: m * Dim("rows", min=least), 3: m * Dim("columns", min=least)}
    return torch.export.export(ProgramModule(program, raw).eval(), (picture,), dynamic_shapes=(sizes,))
