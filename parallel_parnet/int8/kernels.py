"""A program's kernels in int8, once it is known which numbers stand for its features."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches

import torch
from torch import Tensor

from ..errors import ParNetError
from ..program.contract import INPUT, NO_INT8
from ..program.program import Operation, Program
from ..settings import with_own_settings
from .ranges import Range

INT8_MAX = 127  # of a weight: with -128 left out, a weight and its opposite are as far from zero


def quantisable_operations(program: Program, keep: Collection[str] = ()) -> list[Operation]:
    """List the operations that can be quantised: convolutions that do not read the picture, without those to be kept.

    ParNetError for names in `keep` that are no operation's, where none is left, and where the program is quantised
    already.
    """
    if program.quantised:
        raise ParNetError("the program is quantised already: give the fp32 program that it was made of")
    if program.ungated:
        raise ParNetError(f"int8 and fp8 are for ParNets: {NO_INT8}")
    if isinstance(keep, str):
        raise ParNetError(f"keep {keep!r}: give a list of names of operations")
    if unknown := sorted(set(keep) - program.by_name.keys()):
        some = get_close_matches(str(unknown[0]), program.by_name) or list(program.by_name)[:3]
        raise ParNetError(f"keep {unknown[0]!r}: no operation has this name; some are called {', '.join(some)}")
    convolutions = [op for op in program.operations if op.kind == "conv" and INPUT not in op.inputs]
    found = [op for op in convolutions if op.name not in keep]
    if not found:
        raise ParNetError("nothing is left to quantise: only convolutions that read features can be, and are not kept")
    return found


def input_features(operations: Sequence[Operation]) -> list[str]:
    """List the features that operations read, each once."""
    return list(dict.fromkeys(name for op in operations for name in op.inputs))


@with_own_settings
def in_int8(program: Program, ranges: Mapping[str, Range], keep: Collection[str] = ()) -> Program:
    """Make the program with int8 kernels, in steps of each output channel, over features stored as `ranges` say.

    A channel's step is its largest weight, times the step of the input that it multiplies, over 127. Steps of least
    squared error, up to half of that, made the demo's logits no better, so the simpler ones stayed, which have the same
    bits on every machine. keep: operations that stay in fp32, as do features that only these read.
    Raises ParNetError for a feature without a range, and as `quantisable_operations`.
    """
    weights = dict(program.weights)
    operations = quantisable_operations(program, keep)
    features = input_features(operations)
    if missing := [name for name in features if name not in ranges]:
        raise ParNetError(f"feature {missing[0]!r} has no range: calibrate the program on pictures")
    for name in features:
        weights[f"{name}.step"] = torch.tensor([ranges[name].step], dtype=torch.float32, device="cpu")
        weights[f"{name}.zero"] = torch.tensor([ranges[name].zero], dtype=torch.uint8, device="cpu")
    for op in operations:
        steps = [ranges[name].step for name in op.inputs]
        weights[f"{op.name}.weight"], weights[f"{op.name}.weight_step"] = _kernel(weights[f"{op.name}.weight"], steps)
    return replace(program, weights=weights, original=program)


def _kernel(weight: Tensor, steps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Make an int8 weight [cout, k, 3, 3] and its steps, fp32 [cout]. steps: of the inputs, each of which has an equal
    part of the k columns, one after the other."""
    of_column = torch.tensor(steps, dtype=torch.float64, device="cpu").repeat_interleave(weight.shape[1] // len(steps))
    whole, step = stepped(weight.double() * of_column.view(1, -1, 1, 1), INT8_MAX)
    return whole.round().to(torch.int8), step


def stepped(exact: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Divide weights, fp64 [cout, k, 3, 3], by their output channel's step, and return them, within -largest..largest,
    and the steps, fp32 [cout]."""
    step = exact.abs().flatten(1).amax(1) / largest
    step = step.clamp(min=torch.finfo(torch.float32).tiny).float()  # also where all weights are zeros
    return (exact / step.double().view(-1, 1, 1, 1)).clamp(-largest, largest), step
