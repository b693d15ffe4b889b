"""From torch's weight layouts to the kernels', once, before the first picture."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_weight(weight_oihw: Tensor, dtype: torch.dtype) -> Tensor:
    """[O, cin / groups, 3, 3] to [9, cin / groups, O]: a row for each term of K, output channels side by side."""
    return weight_oihw.permute(2, 3, 1, 0).flatten(0, 1).to(dtype).contiguous()


def pack_border(border_ohw: Tensor) -> Tensor:
    """[O, 3, 3] to fp32 [9, O]."""
    return border_ohw.flatten(1).T.float().contiguous()


def pack_gate_weight(weight_oi: Tensor, dtype: torch.dtype) -> Tensor:
    """[O, cin / groups] to [cin / groups, O]."""
    return weight_oi.T.to(dtype).contiguous()
