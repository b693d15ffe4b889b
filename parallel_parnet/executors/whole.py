"""A whole program in one segment on the CPU, with as little around its kernels as can be.

Some milliseconds after a call, the code around the kernels has left the CPU's caches: then whatever of torch a call
needs beside them costs as much as a small network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.cpu import native
from ..settings import in_inference_mode, interferes, is_wrapped, outside_torch_modes
from .answers import Answer, answers_from
from .binding import address
from .local import LocalExecutor
from .native_plan import NativePlan
from .torch_backend import TorchRunner


class WholeExecutor(LocalExecutor):
    """Runs a placement of one lane, on the CPU, by backend "native" or "openvino"."""

    def __call__(self, x_nchw: Tensor) -> Answer:
        """Return logits [N, classes], or outputs by name, fp32, which the next call may overwrite."""
        if self.ranges is not None or not x_nchw.is_cpu:
            return super().__call__(x_nchw)
        (segment,) = self.segments
        outputs = self._runner(x_nchw)((x_nchw,))
        return answers_from(self.program, dict(zip(segment.writes, outputs, strict=True)).__getitem__)

    @outside_torch_modes
    def repeat(self, x_nchw: Tensor) -> Repeat | None:
        """Return what answers pictures like these, which were answered; None where that takes more than our kernels."""
        if self.ranges is not None or not x_nchw.is_cpu or self.program.outputs or x_nchw.dtype not in native.TYPES:
            return None
        plan = self._runner(x_nchw).function((x_nchw,))
        return Repeat(plan, x_nchw) if isinstance(plan, NativePlan) else None

    def _runner(self, x_nchw: Tensor) -> TorchRunner:
        (segment,) = self.segments
        runner = self.kept(x_nchw.shape).bindings.runner(segment, (x_nchw,), {})
        assert isinstance(runner, TorchRunner)
        return runner


class Repeat:
    """Answers pictures of the shape and type of some that were answered, by the same plan, without what an engine does
    for any others: look for the plan, check the picture, and keep out what the caller has set in torch.

    The next call of the plan, whoever's it is, must wait for the end of this.
    """

    def __init__(self, plan: NativePlan, x_nchw: Tensor) -> None:
        self._plan, self._shape, self._dtype = plan, x_nchw.shape, x_nchw.dtype
        ((self._op, self._picture),) = plan.imports
        (logits,) = plan.outputs
        self._logits, self._type = logits.numpy(), native.TYPES[x_nchw.dtype]

    def takes(self, x_nchw: Tensor) -> bool:
        """Return whether a call with these pictures needs nothing else."""
        return (
            not interferes()
            and type(x_nchw) is Tensor
            and not is_wrapped(x_nchw)
            and x_nchw.dtype is self._dtype
            and x_nchw.shape == self._shape
            and x_nchw.is_cpu
            and x_nchw.layout is torch.strided
            and not x_nchw.is_neg()
        )

    def __call__(self, x_nchw: Tensor) -> Tensor:
        """Return logits fp32 [N, classes] in memory of their own."""
        op = self._op
        op.x_type, op.strides = self._type, x_nchw.stride()
        self._picture[0] = x_nchw.data_ptr() or address(x_nchw)  # which refuses what has no memory
        self._plan.run()
        logits = self._logits.copy()
        if in_inference_mode():
            with torch.inference_mode(False):  # so that the answer can be changed outside it
                return torch.from_numpy(logits)
        return torch.from_numpy(logits)
