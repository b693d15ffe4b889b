"""What an operation computes, in torch: the arithmetic of every executor of torch, and what exports hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..network.blocks import ACTIVATION_FUNCTIONS
from ..network.variants import Config
from .contract import E4M3

if TYPE_CHECKING:
    from .program import Operation, Program

E4M3_MAX = torch.finfo(E4M3).max  # 448


def convolution(op: Operation, w: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Compute a convolution as `Operation` defines it: features [N, C, H, W] in and out. w: its weights, see `held`."""
    residual = inputs[-1] if op.residual else None
    inputs, padding = inputs[: len(op.convolved)], op.kernel // 2
    x = _joined(inputs, op.groups)
    if "weight_step" in w:
        whole = _joined([torch.round(v * (1 / step)) for v, step in zip(inputs, w["input_steps"])], op.groups)
        y = F.conv2d(whole, w["weight"], None, op.stride, padding, groups=op.groups)
        y = y.mul_(w["weight_step"]).add_(w["bias"].view(1, -1, 1, 1))
    else:
        y = F.conv2d(x, w["weight"], w["bias"], op.stride, padding, groups=op.groups).float()
    if "border" in w:
        inside = torch.ones_like(x[:1, :1], dtype=torch.float32)
        y = y.add_(F.conv2d(inside, w["border"], None, op.stride, padding))
    if op.gate != "none":
        average = x.mean((2, 3), keepdim=True, dtype=torch.float32)
        gate = torch.sigmoid(F.conv2d(average, w["gate_weight"], w["gate_bias"], groups=op.groups))
        if op.gate == "identity":
            y.addcmul_(x.float(), w["scale"] * gate).add_(w["shift"] * gate)
        else:
            y.mul_(2 * gate)
    if residual is not None:
        y = y.add_(residual)
    y = (ACTIVATION_FUNCTIONS[op.activation](y, inplace=True) if op.activation != "none" else y).to(x.dtype)
    if op.shuffle > 1:
        y = y.unflatten(1, (op.groups, op.shuffle, -1)).transpose(1, 2).flatten(1, 3)
    if "step" not in w:
        return y
    return quantised(y, w["step"], w["zero"]) if "zero" in w else in_e4m3(y, w["step"])


def quantised(values: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """Round fp32 values to what readers see of them once they were stored in uint8. step, zero: [1], both fp32 here."""
    return step * (torch.round(values * (1 / step)).add(zero).clamp(0, 255) - zero)


def in_e4m3(values: Tensor, step: Tensor) -> Tensor:
    """Round fp32 values to what readers see of them once they were stored in e4m3. step: fp32, powers of two.

    Values beyond +-448 saturate; NaN stays NaN. torch's own conversion makes either 448 or NaN of values that are too
    large, depending on its version.
    """
    return step * (values * (1 / step)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float()


def maximum(op: Operation, w: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Take the largest of 3 x 3 values, of those inside the picture: features [N, C, H, W] in and out."""
    return F.max_pool2d(inputs[0], op.kernel, op.stride, padding=1)


def classifier(op: Operation, w: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Compute global averages and a linear layer: features [N, C, H, W] to logits, fp32 [N, classes]."""
    averages = [x.mean((2, 3), dtype=torch.float32) for x in inputs]
    return F.linear(torch.cat(averages, 1), w["weight"], w["bias"])


OPERATIONS = {"conv": convolution, "maxpool": maximum, "classifier": classifier}


def normalisation(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float64 [3], that make a value 0..255 what the network was trained on."""
    mean, std = (torch.tensor(v, dtype=torch.float64, device=device) for v in (config.mean, config.std))
    return 1 / (255 * std), -mean / std


def pixel_affine(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift, fp32 [3, 1, 1], that normalise pixels [N, 3, H, W] of 0..255."""
    scale, shift = (values.float().view(-1, 1, 1) for values in normalisation(config, device))
    return scale, shift


def held(program: Program, op: Operation) -> dict[str, Tensor]:
    """Return an operation's weights as the functions above take them, by their short names, all fp32.

    fp32 holds integers, and sums of products of 8 bits, exactly up to 2^24, and rounds larger ones as it rounds any
    sum. An int8 convolution also gets `input_steps` [inputs], by which it finds the integers that its inputs stand for;
    one in e4m3 gets the weights that multiply its inputs as readers see them, and no `weight_step`.
    """
    weights = {name: shaped(name, tensor.float()) for name, tensor in program.weights_of(op).items()}
    if "weight_step" not in weights:
        return weights
    steps = [program.weights[f"{name}.step"] for name in op.inputs]
    if program.quantised == E4M3:
        weights["weight"] = weights["weight"] * weights.pop("weight_step").view(-1, 1, 1, 1) / of_columns(op, steps)
    else:
        weights["input_steps"] = torch.cat(steps)
    return weights


def of_columns(op: Operation, steps: Sequence[Tensor]) -> Tensor:
    """Return the step of the channel that each weight multiplies, [cout, cin / groups, 1, 1]. steps: [C], by input."""
    of_groups = torch.cat([step.view(op.groups, -1) for step in steps], 1)
    return of_groups.repeat_interleave(op.cout // op.groups, 0)[:, :, None, None]


def shaped(name: str, tensor: Tensor) -> Tensor:
    """Return a weight, given its short name, in the shape in which the functions above take it."""
    if name in ("scale", "shift", "step", "weight_step"):
        return tensor.view(1, -1, 1, 1)
    if name == "gate_weight":
        return tensor[:, :, None, None]
    return tensor.unsqueeze(1) if name == "border" else tensor


def _joined(inputs: list[Tensor], groups: int) -> Tensor:
    """Join one or two inputs [N, C, H, W] to one: group by group, the first input's part, then the second's."""
    if len(inputs) == 1:
        return inputs[0]
    return torch.cat([x.unflatten(1, (groups, -1)) for x in inputs], 2).flatten(1, 2)
