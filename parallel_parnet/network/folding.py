"""A block's branches and batch norms as one kernel, exact up to rounding: worked in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # SyncBatchNorm is one, and no BatchNorm2d
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import ParNetError, warn
from ..settings import with_own_settings

if TYPE_CHECKING:
    from .blocks import ConvBN, RepVGGSSE

CPU = torch.device("cpu")


class FoldedBlock(nn.Module):
    """A block in evaluation mode: one 3x3 convolution, and its gate. Features [N, C, H, W] in and out.

    With an identity:  act(conv(x) + (scale x + shift) sigmoid(gate(avg(x)))), by its batch norm's two, [C, 1, 1].
    Without:           act(conv(x) 2 sigmoid(gate(avg(x)))).
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self, conv: nn.Conv2d, gate: nn.Conv2d, activation: Callable[[Tensor], Tensor],
        scale: Tensor | None = None, shift: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv, self.gate, self.activation = conv, gate, activation
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x_nchw: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x_nchw.mean((2, 3), keepdim=True)))
        y = self.conv(x_nchw)
        if self.scale is None or self.shift is None:
            y = y * (2 * gate)
        else:
            y = y + (self.scale * x_nchw + self.shift) * gate
        y = self.activation(y)
        return y if self.conv.groups == 1 else F.channel_shuffle(y, self.conv.groups)


@with_own_settings
@torch.no_grad()
def fold_block(block: RepVGGSSE) -> FoldedBlock:
    """Fold a block with the statistics that it has now, on its device and in its type. The block stays as it is."""
    kept = block.rbr_dense.conv.weight
    weight, bias = one_kernel(block)
    groups, stride = block.rbr_dense.conv.groups, block.rbr_dense.conv.stride
    gate_weight, gate_bias = to_float64(block.se.weight).flatten(1), torch.zeros_like(bias)
    of_identity: tuple[Tensor, ...] = ()
    if block.rbr_identity is not None:  # the gate averages what left the norm
        scale, shift = affine(block.rbr_identity)
        gate_weight, gate_bias = behind_affine(gate_weight, scale.view(groups, -1), shift.view(groups, -1))
        of_identity = tuple(v.view(-1, 1, 1).to(kept) for v in (scale, shift))
    folded = FoldedBlock(
        _convolution(weight, bias, kept, stride, groups),
        _convolution(gate_weight[:, :, None, None], gate_bias, kept, 1, groups),
        block.activation, *of_identity,
    )  # fmt: skip
    return folded.eval().requires_grad_(False)


def make_weights(network: nn.Module) -> None:
    """Make weights anew that hooks make before each pass, as pruning does: else they are those of the last one. Warn of
    other hooks of passes, which no fold takes along."""
    for name, part in network.named_modules():
        training, part.training = part.training, False  # in which legacy spectral norm makes weights alone
        others = len(part._forward_hooks)
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm):
                hook(part, ())
            else:
                others += 1
        part.training = training
        if others:
            warn(f"{name or 'the network'} has {others} hook(s), which are not folded: what they change is lost")


def one_kernel(block: RepVGGSSE) -> tuple[Tensor, Tensor]:
    """Make one 3x3 kernel [cout, cin / groups, 3, 3] and bias [cout], float64, of both branches. A pooled 1x1 kernel is
    spread over the four taps that it averages."""
    weight, bias = _conv_bn(block.rbr_dense)
    pointwise, bias_1x1 = _conv_bn(block.pointwise)
    weight = weight.clone()
    if isinstance(block.rbr_1x1, nn.Sequential):
        weight[:, :, 1:, 1:] += pointwise / 4
    else:
        weight[:, :, 1:2, 1:2] += pointwise
    return weight, bias + bias_1x1


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float64 [C], of a batch norm in evaluation mode. ParNetError for what has none."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None or norm.bias is None:
        raise ParNetError(f"{norm}: only batch norms with weights and running statistics can be folded")
    scale = to_float64(norm.weight) / torch.sqrt(to_float64(norm.running_var) + norm.eps)
    return scale, to_float64(norm.bias) - to_float64(norm.running_mean) * scale


def behind_affine(weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights for x in place of weights for scale x + shift, and what the shift adds to each output channel.

    weight: [cout, cin / groups, ...]; scale, shift: [groups, cin / groups]. The second result is [cout, ...], an addend
    for each tap where the weight has taps.
    """
    rows = torch.arange(len(weight), device=weight.device) // (len(weight) // len(scale))  # each output channel's group
    taps = [1] * (weight.ndim - 2)
    scale, shift = (values[rows].view(*weight.shape[:2], *taps) for values in (scale, shift))
    return weight * scale, (weight * shift).sum(1)


def to_float64(tensor: Tensor) -> Tensor:
    """Copy to the CPU in float64; a tensor on the device meta, of a model of shapes alone, stays there."""
    return tensor.detach().to("meta" if tensor.is_meta else CPU, torch.float64)


def _conv_bn(branch: ConvBN) -> tuple[Tensor, Tensor]:
    scale, shift = affine(branch.bn)
    return to_float64(branch.conv.weight) * scale[:, None, None, None], shift


def _convolution(weight: Tensor, bias: Tensor, like: Tensor, stride: int | tuple[int, ...], groups: int) -> nn.Conv2d:
    cout, cin, kernel, _ = weight.shape
    with torch.device("meta"):  # nothing to initialise
        conv = nn.Conv2d(cin * groups, cout, kernel, stride, padding=kernel // 2, groups=groups)  # type: ignore[arg-type]
    conv.weight, conv.bias = (nn.Parameter(v.to(like, copy=True)) for v in (weight, bias))
    return conv
