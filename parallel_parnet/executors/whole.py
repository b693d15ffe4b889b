"""A whole program in one segment on the CPU, with as little around its kernels as can be.

Some milliseconds after a call, the code around the kernels has left the CPU's caches: then whatever of torch a call
needs beside them costs as much as a small network.
"""

from __future__ import annotations

from torch import Tensor

from .answers import Answer, answers_from
from .local import LocalExecutor


class WholeExecutor(LocalExecutor):
    """Runs a placement of one lane, on the CPU, by backend "native" or "openvino"."""

    def __call__(self, x_nchw: Tensor) -> Answer:
        """Return logits [N, classes], or outputs by name, fp32, which the next call may overwrite."""
        if self.ranges is not None or not x_nchw.is_cpu:
            return super().__call__(x_nchw)
        (segment,) = self.segments
        outputs = self.kept(x_nchw.shape).bindings.runner(segment, (x_nchw,), {})((x_nchw,))
        return answers_from(self.program, dict(zip(segment.writes, outputs, strict=True)).__getitem__)
