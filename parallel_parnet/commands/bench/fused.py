"""ParNet as its users deploy it in torch: the branches of a block in one convolution, the rest as it was trained."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from parallel_parnet import ParNet
from parallel_parnet.network.blocks import ParNetBlock, RepVGGSSE


class FusedBlock(nn.Module):
    """A RepVGG-SSE block with one convolution; the identity stays a batch norm, since its gate stands in between."""

    def __init__(self, block: RepVGGSSE) -> None:
        super().__init__()
        self.rbr_reparam = one_convolution(block)
        self.rbr_identity, self.se, self.activation = block.rbr_identity, block.se, block.activation

    def forward(self, x_nchw: Tensor) -> Tensor:
        y = self.rbr_reparam(x_nchw)
        if self.rbr_identity is not None:
            identity = self.rbr_identity(x_nchw)
            return self.activation(y + identity * self.se(identity))
        return self.activation(y * (2 * self.se(x_nchw)))


@torch.no_grad()
def one_convolution(block: RepVGGSSE) -> nn.Conv2d:
    """Both branches as a 3x3 convolution with a bias; an average of 2x2 becomes four equal taps."""
    dense, small = (fuse_conv_bn_eval(branch.conv, branch.bn) for branch in (block.rbr_dense, block.pointwise))
    if isinstance(block.rbr_1x1, nn.Sequential):
        dense.weight[:, :, 1:, 1:] += small.weight / 4
    else:
        dense.weight[:, :, 1:2, 1:2] += small.weight
    dense.bias += small.bias
    return dense


def fuse(model: ParNet) -> ParNet:
    """A copy of the model, in evaluation mode, with every block fused."""
    fused = deepcopy(model).eval()
    for module in list(fused.modules()):
        if isinstance(module, ParNetBlock):
            module.block = FusedBlock(module.block)
    return fused.eval().requires_grad_(False)
