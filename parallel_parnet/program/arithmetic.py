"""What an operation computes, in torch: the arithmetic of every executor of torch, and what exports hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..network.blocks import ACTIVATION
from ..network.variants import Config

if TYPE_CHECKING:
    from .program import Operation


def convolution(op: Operation, w: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """A gated 3x3 convolution as `Operation` defines it: features [N, C, H, W] in and out."""
    x = inputs[0] if len(inputs) == 1 else _pair(inputs, op.groups)
    y = F.conv2d(x, w["weight"], w["bias"], op.stride, padding=1, groups=op.groups).float()
    if "border" in w:
        inside = torch.ones_like(x[:1, :1], dtype=torch.float32)
        y = y.add_(F.conv2d(inside, w["border"], None, op.stride, padding=1))
    average = x.mean((2, 3), keepdim=True, dtype=torch.float32)
    gate = torch.sigmoid(F.conv2d(average, w["gate_weight"], w["gate_bias"], groups=op.groups))
    if op.gate == "identity":
        y.addcmul_(x.float(), w["scale"] * gate).add_(w["shift"] * gate)
    else:
        y.mul_(2 * gate)
    y = ACTIVATION[op.activation](y, inplace=True).to(x.dtype)
    if op.shuffle > 1:
        y = y.unflatten(1, (op.groups, op.shuffle, -1)).transpose(1, 2).flatten(1, 3)
    return y


def classifier(op: Operation, w: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Global averages and linear layer: features [N, C, H, W] to logits fp32 [N, classes]."""
    averages = [x.mean((2, 3), dtype=torch.float32) for x in inputs]
    return F.linear(torch.cat(averages, 1), w["weight"], w["bias"])


OPERATIONS = {"conv": convolution, "classifier": classifier}


def affine(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift, float64 [3], that make a value 0..255 what the network was trained on."""
    mean, std = (torch.tensor(v, dtype=torch.float64, device=device) for v in (config.mean, config.std))
    return 1 / (255 * std), -mean / std


def shaped(name: str, tensor: Tensor) -> Tensor:
    """A weight in the shape in which the arithmetic above takes it."""
    if name in ("scale", "shift"):
        return tensor.view(1, -1, 1, 1)
    if name == "gate_weight":
        return tensor[:, :, None, None]
    return tensor.unsqueeze(1) if name == "border" else tensor


def _pair(inputs: list[Tensor], groups: int) -> Tensor:
    """[N, C, H, W] twice to [N, 2 C, H, W]: group by group, the first input's part, then the second's."""
    return torch.cat([x.unflatten(1, (groups, -1)) for x in inputs], 2).flatten(1, 2)
