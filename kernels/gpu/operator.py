"""`torch.ops.parallel_parnet.fused_conv`: the fused convolution as one operator of torch.

On the CPU the twin runs, on CUDA the Triton kernel; the fake implementation lets torch.compile and torch.export carry
the operator through. The engine itself launches prepared kernels (`level.level`) and does without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import ParNetError
from .convolution import Convolution, Operands, allocate, outputs
from .geometry import Geometry, Tile
from .twins import fused_conv as twin


@torch.library.custom_op("parallel_parnet::fused_conv", mutates_args=())
def fused_conv(
    a: Tensor,
    b: Tensor | None,
    a_sums: Tensor | None,
    b_sums: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    border: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int = 1,
    groups: int = 1,
    shuffle: int = 1,
    activation: str = "silu",
    bm: int = 64,
    split_k: int = 1,
    num_warps: int = 4,
    num_stages: int = 4,
) -> tuple[Tensor, Tensor]:
    """y [N, H out, W out, O aligned] in storage and its sums fp32 [N, T, O], of a gated 3x3 convolution.

    Tensors as in `convolution.Operands`: without a_sums, `a` is a picture [N, 3, H, W]; with scale and shift, the gate
    is on the identity. bm and split_k as in `geometry.Tile`, whose bk and bn are those of the packed weight; T depends
    on bm.
    """
    tensors = (a, b, a_sums, b_sums, weight, bias, border, gate_weight, gate_bias, scale, shift)
    conv = _convolution(*tensors, stride, groups, shuffle, activation, bm, split_k)
    if a.is_cuda:
        from .level import level

        level([conv], num_warps, num_stages)()
    else:
        conv.check()
        twin(conv)
    return _made(conv)


@fused_conv.register_fake
def _fake(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    conv = _convolution(*arguments, **options)
    conv.check()
    return _made(conv)


def _made(conv: Convolution) -> tuple[Tensor, Tensor]:
    assert conv.x.sums is not None, "of any shape that `_convolution` describes"
    return conv.x.y, conv.x.sums


def _convolution(
    a: Tensor, b: Tensor | None, a_sums: Tensor | None, b_sums: Tensor | None, weight: Tensor, bias: Tensor,
    border: Tensor | None, gate_weight: Tensor, gate_bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    stride: int = 1, groups: int = 1, shuffle: int = 1, activation: str = "silu",
    bm: int = 64, split_k: int = 1, num_warps: int = 4, num_stages: int = 4,
) -> Convolution:  # fmt: skip
    """The convolution that the operator's arguments describe, with new tensors for what it writes."""
    if a.ndim != 4 or weight.ndim != 4 or (a_sums is not None and a_sums.ndim != 3):
        raise ParNetError(
            f"a {list(a.shape)}, weight {list(weight.shape)}: expected four dimensions, and three of sums"
        )
    inputs = 1 if b is None else 2
    h, w = a.shape[2:] if a_sums is None else a.shape[1:3]
    cin, gate = inputs * (a.shape[1] if a_sums is None else a_sums.shape[2]), "plain" if scale is None else "identity"
    shape = Geometry(h, w, cin, bias.shape[0], stride, groups, shuffle, gate, activation, inputs, a_sums is None)
    tile = Tile(bm, weight.shape[3], weight.shape[2], split_k)
    made = allocate(outputs(shape, tile, a.shape[0], weight.dtype), a.device)
    x = Operands(a, b, a_sums, b_sums, weight, bias, border, gate_weight, gate_bias, scale, shift, None, **made)
    return Convolution(x, shape, tile)
