"""The kernels' twins in plain torch: same arguments, same layouts, same outputs, on any device.

They compute in fp32 from the stored inputs and round once, where a feature is stored, as the kernels do; only the
order of additions differs. The CPU uses them behind the operator, and the tests hold the kernels against them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import Convolution
from .packing import unpack_weight

LARGEST = 448.0  # of e4m3, which what is larger becomes


def fused_conv(conv: Convolution) -> None:
    """Fill y and sums, as `fused_conv.fused_conv_tile` does over all programs."""
    x, s = conv.x, conv.shape
    weight = unpack_weight(x.weight, s, conv.tile).float()
    bias = x.bias if x.weight_step is None else None
    y = F.conv2d(_input(conv), weight, bias, s.stride, padding=s.kernel // 2, groups=s.groups)
    if x.weight_step is not None:
        y = y * x.weight_step[:, None, None] + x.bias[:, None, None]
    if x.border is not None:
        inside = torch.ones(1, 1, s.h, s.w, dtype=torch.float32, device=y.device)
        border = x.border.T.reshape(s.cout, 1, s.kernel, s.kernel)
        y += F.conv2d(inside, border, None, s.stride, padding=s.kernel // 2)
    if s.gate == "identity":
        assert x.scale is not None and x.shift is not None
        y += (x.scale[:, None, None] * _input(conv) + x.shift[:, None, None]) * sse_gate(conv)[:, :, None, None]
    elif s.gate == "plain":
        y *= 2 * sse_gate(conv)[:, :, None, None]
    if x.residual is not None:
        y += x.residual[..., : s.cout].permute(0, 3, 1, 2)
    if s.activation != "none":
        y = (F.silu if s.activation == "silu" else F.relu)(y)
    y = y.unflatten(1, (s.groups, s.shuffle, -1)).transpose(1, 2).flatten(1, 3)
    if x.step is not None:
        y = (y * (1 / x.step)[:, None, None]).clamp(-LARGEST, LARGEST)
    x.y.zero_()[..., : s.cout].copy_(y.permute(0, 2, 3, 1))
    if x.sums is None:
        return
    stored = x.y[..., : s.cout].flatten(1, 2).float()
    if x.step is not None:
        stored = stored * x.step
    x.sums.zero_()[..., : s.cout].copy_(per_tile(stored.unflatten(1, (s.hout, s.wout)), conv))


def per_tile(values_nhwo: Tensor, conv: Convolution) -> Tensor:
    """Sums [N, T, O] of an output's values over each spatial tile."""
    shape, tile = conv.shape, conv.tile
    numbered = F.pad(values_nhwo, (0, 0, 0, tile.pitch(shape) - shape.wout)).flatten(1, 2)
    whole = tile.spatial(shape) * tile.bm
    return F.pad(numbered, (0, 0, 0, whole - numbered.shape[1])).unflatten(1, (-1, tile.bm)).sum(2)


def sse_gate(conv: Convolution) -> Tensor:
    """Gates fp32 [N, O], as `sse_gate.gates` computes them."""
    x, s = conv.x, conv.shape
    assert x.gate_weight is not None, "the operation has a gate"
    if s.planar:
        average = x.a.float().mean((2, 3))
    else:
        channels = s.cin // s.inputs
        given = [t[..., :channels].sum(1) for t in (x.a_sums, x.b_sums) if t is not None]
        sums = [t.unflatten(1, (s.groups, -1)) for t in given]
        average = torch.cat(sums, 2).flatten(1) / (s.h * s.w)
    weight = x.gate_weight[:, : s.cout].float().T[:, :, None, None]
    return torch.sigmoid(F.conv2d(average[:, :, None, None], weight, x.gate_bias, groups=s.groups).flatten(1))


def classifier(sums: Tensor, pixels: int, weight: Tensor, bias: Tensor, logits: Tensor) -> None:
    """Fill logits, as `classifier.classifier_kernel` does."""
    logits.copy_(F.linear(sums.sum(1)[:, : weight.shape[1]] / pixels, weight.float(), bias))


def _input(conv: Convolution) -> Tensor:
    """All input channels, fp32 [N, cin, H, W]: group by group, the first tensor's part, then the second's."""
    if conv.shape.planar:
        return conv.x.a.float()
    channels = conv.shape.cin // conv.shape.inputs
    given = [t[..., :channels].float() for t in (conv.x.a, conv.x.b) if t is not None]
    parts = [t.unflatten(3, (conv.shape.groups, -1)) for t in given]
    return torch.cat(parts, 4).flatten(3).permute(0, 3, 1, 2)
