"""What runs on a GPU that nobody has vouched for: candidates are held against the reference there, and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .choice import Choice, Forward, Make, measure
from .errors import ParNetError
from .executors.answers import Answer, largest_error
from .parity import tolerance
from .program.placement import Placement
from .program.program import Program
from .transport import gather


def prove(
    program: Program,
    choices: Sequence[Choice],
    make: Make,
    x_nchw: Tensor,
    dtype: torch.dtype,
    wait: Callable[[], None],
    enough: float,
) -> tuple[list[tuple[float, Choice, Forward]], list[str]]:
    """Time the choices that run on this device and agree with the reference, fastest first; and a line of reason for
    each that was dropped.

    make: builds what runs a choice. x_nchw: pictures; where the reference's answer to them is not finite, which tells
    nothing of an executor, noise of their shape is run instead. dtype: of the engine, by which the tolerance is
    chosen. wait: blocks until the device has done its work. enough: seconds of measuring. ParNetError where no choice
    is left, or the reference lacks memory.
    """
    try:
        x_nchw, expected, limit = _expected(program, make, x_nchw, dtype)
    except torch.OutOfMemoryError as reason:
        raise ParNetError(
            "out of memory: executor auto holds others against the reference, in fp32: name an executor, or call "
            "warm_up with fewer pictures first"
        ) from reason
    found, lines = _agreeing(choices, make, x_nchw, expected, limit)
    if not found:
        raise ParNetError(f"no executor can be had: {'; '.join(lines)}")

    def waited(run: Forward) -> None:
        run(x_nchw)
        wait()

    seconds = measure([partial(waited, run) for _, run in found], enough)
    return sorted(((s, *row) for s, row in zip(seconds, found, strict=True)), key=lambda row: row[0]), lines


def _expected(program: Program, make: Make, x_nchw: Tensor, dtype: torch.dtype) -> tuple[Tensor, Answer, float]:
    """Pictures that tell something, the reference's answer to them, and how far others may be off."""
    single = Placement.single(program)
    reference = make(Choice("reference", single, None, "whole"), torch.float32)
    expected = reference(x_nchw)
    if largest_error(expected, expected) > 0:
        x_nchw = noise(x_nchw.shape, x_nchw.device).to(x_nchw.dtype)
        expected = reference(x_nchw)
    del reference  # and its memory
    eager = Choice("eager", single, None, "whole")
    of_torch = 0.0 if dtype == torch.float32 else largest_error(make(eager, None)(x_nchw), expected)
    return x_nchw, expected, tolerance(dtype, of_torch)


def _agreeing(
    choices: Sequence[Choice], make: Make, x_nchw: Tensor, expected: Answer, limit: float
) -> tuple[list[tuple[Choice, Forward]], list[str]]:
    """The choices that run and answer as expected, and a line of reason for each other one."""
    found, lines = [], []
    for choice in choices:
        try:
            run = make(choice, None)
            wrong = largest_error(run(x_nchw), expected)
        except Warning:
            raise  # Python was told, as by -W error, to make errors of them: no fault of the candidate's
        except Exception as reason:  # whatever compilers and drivers raise
            lines.append(f"{choice}: {type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}")
            continue
        if wrong <= limit:
            found.append((choice, run))
        else:
            lines.append(f"{choice}: its answer is off by {wrong:.1e}, of which rounding explains {limit:.1e}")
    return found, lines


def prove_on_all_ranks(
    program: Program, make: Make, device: torch.device, dtype: torch.dtype, wait: Callable[[], None]
) -> tuple[str, list[str]]:
    """Choose the executor of ranks: "cuda_graph", captured Triton kernels, where it agrees with the reference on every
    rank's GPU; else "eager", and lines that say why. All ranks call it together."""
    side = program.config.image_size
    x_nchw = noise((1, 3, side, side), device)
    choice, lines = Choice("cuda_graph", Placement.single(program), None, "on one rank"), []
    try:
        prove(program, [choice], make, x_nchw, dtype, wait, enough=0.0)
    except (ParNetError, Warning) as error:  # of which the other ranks, that wait for this one, know nothing
        lines.append(str(error))
    failed = [rank for rank, (bad,) in enumerate(gather([len(lines)])) if bad]
    if not failed:
        return "cuda_graph", []
    return "eager", lines or [f"executor eager runs, since rank {rank} cannot have cuda_graph" for rank in failed]


def noise(shape: Sequence[int], device: torch.device) -> Tensor:
    """Pictures that are always the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
