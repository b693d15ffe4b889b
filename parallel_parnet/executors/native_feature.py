"""A feature map as the CPU kernels store it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.cpu import native


@dataclass(frozen=True)
class Feature:
    """A feature map in memory.

    padded: [N, H + 2 edge, W + 2 edge, C] of one of `native.TYPES`; its values mean step * (padded - zero), and its
    border means zeros. sums: of each channel of padded, [N, chunks, C], where a gate or a classifier reads them. copy:
    what padded means, in fp32, where somebody reads that.
    """

    padded: Tensor
    sums: Tensor | None
    edge: int = native.EDGE
    step: float = 1.0
    zero: int = 0
    copy: Tensor | None = None

    @property
    def fp32(self) -> Tensor:
        """The feature map in fp32, [N, H + 2 edge, W + 2 edge, C]."""
        return self.padded if self.copy is None else self.copy

    @property
    def pitch(self) -> int:
        """How many values stand between a pixel and the next, in all of its tensors."""
        return self.padded.stride(2)

    @property
    def size(self) -> tuple[int, int]:
        """Its height and width, without the border."""
        return self.padded.shape[1] - 2 * self.edge, self.padded.shape[2] - 2 * self.edge

    @property
    def nchw(self) -> Tensor:
        """A view of the feature map in fp32, [N, C, H, W], without the border."""
        return self.fp32[:, self.edge : -self.edge, self.edge : -self.edge].permute(0, 3, 1, 2)

    def read_as(self, dtype: torch.dtype) -> Tensor:
        """Return the tensor for an operation that reads this type: where `padded` has another, the one in fp32."""
        return self.padded if self.padded.dtype == dtype else self.fp32
