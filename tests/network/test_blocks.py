"""The block by itself: trainable, and folded to one convolution with its gate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from parallel_parnet import VARIANTS, ParNet, ParNetBlock, ParNetError, create_model, fold_blocks, list_models
from parallel_parnet.network.folding import FoldedBlock
from small import SMALL, lively, relative


@torch.no_grad()
def lively_block(cin: int, cout: int, stride: int, groups: int, activation: str) -> ParNetBlock:
    """With norms that scale and shift."""
    block = ParNetBlock(cin, cout, stride, groups, activation)
    for norm in (module for module in block.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.momentum = 1.0
    block(3 * torch.randn(4, cin, 16, 16) + 1)
    return block.eval()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2]), st.integers(1, 3), st.sampled_from(["silu", "relu"]),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_folded_is_equal(cin: int, cout: int, stride: int, groups: int, activation: str, same: bool, seed: int) -> None:
    torch.manual_seed(seed)
    block = lively_block(groups * cin, groups * (cin if same else cout), stride, groups, activation)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    folded, x = block.fold(), 3 * torch.randn(2, groups * cin, 8, 10) + 1
    with torch.no_grad():
        expected = block(x)
    if expected.norm() > 1e-3:  # ReLU may leave nothing
        assert relative(folded(x), expected) < 1e-5
    assert folded(x).shape == expected.shape == (2, block.block.rbr_dense.conv.out_channels, 8 // stride, 10 // stride)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_folded_with_norms_that_ranks_share() -> None:
    block, x = lively_block(8, 8, 1, 1, "silu"), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        expected = block(x)
    assert relative(nn.SyncBatchNorm.convert_sync_batchnorm(block).fold()(x), expected) < 1e-5


def test_what_a_folded_block_is() -> None:
    """Two convolutions, of which one reads averages, and nothing to train; in the type of the block."""
    block = lively_block(8, 8, 1, 1, "silu").double()
    folded = block.fold()
    assert [tuple(m.weight.shape) for m in folded.modules() if isinstance(m, nn.Conv2d)] == [(8, 8, 3, 3), (8, 8, 1, 1)]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters()) and not folded.training
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    assert relative(folded(x), block(x)) < 1e-12
    exported = torch.export.export(folded, (x,)).module()
    assert torch.equal(exported(x), folded(x))


def test_it_trains() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(ParNetBlock(3, 8, stride=2), ParNetBlock(8, 8), ParNetBlock(8, 16, 2, 2), nn.Flatten())
    network.append(nn.LazyLinear(2))
    x, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 2
    network(x)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for _ in range(20):
        loss = nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert (network.eval()(x).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 8, 3), "stride 3: choose 1 or 2"),
        ((3, 8, 1, 2), "3 to 8 channels in 2 groups"),
        ((8, 0), "8 to 0 channels"),
        ((8, 8, 1, 1, "gelu"), "activation 'gelu': choose one of silu, relu"),
    ],
)
def test_refusals(arguments: tuple, message: str) -> None:
    with pytest.raises(ParNetError, match=message):
        ParNetBlock(*arguments)


def test_all_blocks_of_a_network_are_folded() -> None:
    """Also one that stands twice, which stays one; the network keeps its own."""
    block = lively_block(8, 8, 1, 1, "silu")
    network = nn.Sequential(lively_block(3, 8, 2, 1, "silu"), nn.Sequential(block, block), nn.Flatten()).train()
    x = torch.randn(2, 3, 16, 16)
    folded = fold_blocks(network)
    assert network.training and isinstance(network[0], ParNetBlock) and not folded.training
    assert [type(m) for m in (folded[0], *folded[1])] == [FoldedBlock] * 3 and folded[1][0] is folded[1][1]
    with torch.no_grad():
        assert relative(folded(x), network.eval()(x)) < 1e-5


def test_a_block_or_a_whole_network_is_a_network() -> None:
    block, x = lively_block(8, 8, 1, 2, "relu"), torch.randn(1, 8, 4, 6)
    assert isinstance(fold_blocks(block), FoldedBlock) and torch.equal(fold_blocks(block)(x), block.fold()(x))
    model, x = lively(SMALL, 0), torch.randn(1, 3, 32, 64)
    folded = fold_blocks(model)
    assert isinstance(folded, ParNet) and not any(isinstance(m, nn.BatchNorm2d) for m in folded.streams.modules())
    with torch.no_grad():
        assert relative(folded(x), model(x)) < 1e-5


def test_models_are_listed_by_name() -> None:
    assert "parnet_s" in list_models()
    with torch.device("meta"):
        assert all(create_model(name).config == VARIANTS[name] for name in list_models())
