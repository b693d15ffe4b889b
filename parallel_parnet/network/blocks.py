"""ParNet's blocks in training form. Submodules carry the released code's names, so its checkpoints load as they are.

Shape letters: N batch, C channels, H and W height and width.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ParNetError
from .folding import FoldedBlock, fold_block, make_weights
from .parts import check_parts

ACTIVATION_FUNCTIONS = {"silu": F.silu, "relu": F.relu}


class ConvBN(nn.Module):
    """A convolution without bias, then batch norm."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)

    def forward(self, x_nchw: Tensor) -> Tensor:
        return self.bn(self.conv(x_nchw))


class Gate(nn.Module):
    """sigmoid(W avg(x)): skip-squeeze-excitation's channel weights, [N, C, 1, 1] (paper, section 3.1)."""

    def __init__(self, cin: int, cout: int, groups: int) -> None:
        super().__init__()
        self.cvsig = nn.ModuleDict({"conv": nn.Conv2d(cin, cout, 1, groups=groups, bias=False)})

    @property
    def weight(self) -> Tensor:
        """The kernel of the 1x1 convolution, [cout, cin / groups, 1, 1]."""
        conv = self.cvsig["conv"]
        assert isinstance(conv, nn.Conv2d)
        return conv.weight  # which pruning, or a parametrisation, may compute

    def forward(self, x_nchw: Tensor) -> Tensor:
        return torch.sigmoid(self.cvsig["conv"](x_nchw.mean((2, 3), keepdim=True)))


class RepVGGSSE(nn.Module):
    """The RepVGG-SSE block, and the downsampling and fusion block, which has no identity (paper, section 3.1).

    With an identity, id = BN(x):  act(BN(conv3(x)) + BN(conv1(x)) + id * gate(id)).
    Without:                       act((BN(conv3(x)) + BN(conv1(pool(x)))) * 2 gate(x)).
    """

    def __init__(self, cin: int, cout: int, stride: int, groups: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATION_FUNCTIONS[activation]
        self.rbr_identity = nn.BatchNorm2d(cin) if cin == cout and stride == 1 else None
        self.rbr_dense = ConvBN(cin, cout, 3, stride, groups)
        self.rbr_1x1: nn.Module = ConvBN(cin, cout, 1, 1, groups)
        if stride == 2:
            self.rbr_1x1 = nn.Sequential(nn.AvgPool2d(2), self.rbr_1x1)
        self.se = Gate(cin, cout, groups)

    @property
    def pointwise(self) -> ConvBN:
        """The 1x1 branch, without the average in front of it."""
        branch = self.rbr_1x1[1] if isinstance(self.rbr_1x1, nn.Sequential) else self.rbr_1x1
        assert isinstance(branch, ConvBN)
        return branch

    def forward(self, x_nchw: Tensor) -> Tensor:
        y = self.rbr_dense(x_nchw) + self.rbr_1x1(x_nchw)
        if self.rbr_identity is not None:
            identity = self.rbr_identity(x_nchw)
            return self.activation(y + identity * self.se(identity))
        return self.activation(y * (2 * self.se(x_nchw)))


class ParNetBlock(nn.Module):
    """A RepVGG-SSE block, its output channels shuffled where it is grouped: for ParNet, and for anybody's network.

    Features [N, cin, H, W] to [N, cout, H / stride, W / stride]; H and W even for stride 2. groups: of the channels;
    divides cin and cout. activation: "silu" or "relu". An identity branch stands where cin is cout and stride 1.
    Raises ParNetError for other values.
    """

    def __init__(self, cin: int, cout: int, stride: int = 1, groups: int = 1, activation: str = "silu") -> None:
        super().__init__()
        if any(type(count) is not int or count < 1 for count in (cin, cout, groups)) or cin % groups or cout % groups:
            raise ParNetError(f"{cin} to {cout} channels in {groups} groups: positive, and divisible by the groups")
        if type(stride) is not int or stride not in (1, 2):
            raise ParNetError(f"stride {stride!r}: choose 1 or 2")
        if activation not in ACTIVATION_FUNCTIONS:
            raise ParNetError(f"activation {activation!r}: choose one of {', '.join(ACTIVATION_FUNCTIONS)}")
        self.cin, self.cout, self.stride, self.groups = cin, cout, stride, groups
        self.block = RepVGGSSE(cin, cout, stride, groups, activation)

    def forward(self, x_nchw: Tensor) -> Tensor:
        y = self.block(x_nchw)
        return y if self.groups == 1 else F.channel_shuffle(y, self.groups)

    def fold(self) -> FoldedBlock:
        """Fold the block, as it is in evaluation mode, into one convolution with its gate, to run and not to train.

        The result is equal up to rounding, a copy of the block's type and on its device. ParNetError where a part of
        the block was replaced by another.
        """
        with torch.device("meta"):
            check_parts(self, ParNetBlock(self.cin, self.cout, self.stride, self.groups))
        make_weights(self)
        return fold_block(self.block)


def fold_blocks(network: nn.Module) -> nn.Module:
    """Copy any network, in evaluation mode, with every `ParNetBlock` in it folded: equal up to rounding, to run and not
    to train. It is what timm's `reparameterize_model` does for timm's blocks.

    The network stays as it is, and what is no block is copied. Whole ParNets gain more from `fold`. ParNetError where a
    part of a block was replaced by another.
    """
    network = copy.deepcopy(network).eval()
    folded = {block: block.fold() for block in network.modules() if isinstance(block, ParNetBlock)}
    for module in list(network.modules()):
        for name, child in list(module._modules.items()):  # named_children leaves out a second name of the same block
            if isinstance(child, ParNetBlock):
                setattr(module, name, folded[child])
    return folded[network] if isinstance(network, ParNetBlock) else network


class Pair(nn.Module):
    """Two feature maps of C channels to one of 2 C: batch norm on each, channels interleaved a0, b0, a1, b1, ..."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.b1 = nn.BatchNorm2d(channels)
        self.b2 = nn.BatchNorm2d(channels)

    def forward(self, a_nchw: Tensor, b_nchw: Tensor) -> Tensor:
        return torch.stack((self.b1(a_nchw), self.b2(b_nchw)), dim=2).flatten(1, 2)


class Fusion(nn.Sequential):
    """A pair, then blocks. Index 1 has no parameters; it keeps the released numbering."""

    def __init__(self, pair: Pair, *blocks: ParNetBlock) -> None:
        super().__init__(pair, nn.Identity(), *blocks)

    def forward(self, a_nchw: Tensor, b_nchw: Tensor) -> Tensor:  # type: ignore[override]
        y = self[0](a_nchw, b_nchw)
        for block in list(self)[1:]:
            y = block(y)
        return y
