"""The comparison networks: depth, width and parameters as published, and the same answers as plain torch modules."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from parallel_parnet import Engine, ParNetError, Program
from parallel_parnet.commands.bench.poster_networks import PEERS
from parallel_parnet.program.rivals import RIVALS, rival
from small import OPTIONAL, relative

# parameters in training form (ResNet: torchvision's documentation) or as deployed (RepVGG: arXiv 2101.03697, table 4;
# B2g4 55.77 there), and depth as published
PUBLISHED = {
    "resnet34": (21_797_672, 34), "resnet50": (25_557_032, 50), "repvgg_a0": (8.31e6, 22),
    "repvgg_b1g4": (36.13e6, 28), "repvgg_b2g4": (55.77e6, 28),
}  # fmt: skip
# millions of parameters and GFLOPs, as the poster gives them
POSTER = {
    "resnet34": (21.8, 7.3), "resnet50": (25.6, 8.2), "repvgg_b1g4": (36.1, 14.6), "repvgg_b2g4": (55.8, 22.7),
}  # fmt: skip
WIDTHS = {"resnet34": 512, "resnet50": 2048, "repvgg_a0": 1280, "repvgg_b1g4": 2048, "repvgg_b2g4": 2560}


@pytest.mark.parametrize("name", RIVALS)
def test_published_sizes(name: str) -> None:
    program, (parameters, depth) = rival(name), PUBLISHED[name]
    convolutions = [op for op in program.operations if op.kind == "conv"]
    if name.startswith("resnet"):  # folding leaves one number of a norm's two, its shift, as the bias
        assert program.parameters + sum(op.cout for op in convolutions) == parameters
        assert program.depth == depth + 1, "a level for the maximum"
        projections = [op for op in convolutions if op.name.endswith("projection")]
        assert len(convolutions) - len(projections) + 1 == depth
        assert [op.stride for op in projections] == ([1, 2, 2, 2] if name == "resnet50" else [2, 2, 2])
    else:
        assert program.parameters == pytest.approx(parameters, rel=1e-3)
        assert len(convolutions) == depth
        assert program.depth == depth + 1, "a level for the classifier"
    assert program.operations[-1].cin == WIDTHS[name]
    assert program.shape(program.operations[-2].name, 1, 224, 224)[2:] == (7, 7)


def test_parameters_layer_by_layer() -> None:
    """ResNet-34's by hand, in training form."""
    stages = [(64, 64, 3), (64, 128, 4), (128, 256, 6), (256, 512, 3)]
    total = 3 * 64 * 49 + 2 * 64 + 512 * 1000 + 1000
    for cin, cout, count in stages:
        total += 9 * cin * cout + (2 * count - 1) * 9 * cout**2 + 2 * count * 2 * cout
        total += cin * cout + 2 * cout if cin != cout else 0
    program = rival("resnet34")
    assert program.parameters + sum(op.cout for op in program.operations if op.kind == "conv") == total


@pytest.mark.parametrize("name", PEERS)
def test_flops_agree_with_torch(name: str) -> None:
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        network = PEERS[name]().eval()
        assert network(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    flops, (parameters, gflops) = counter.get_total_flops(), POSTER[name]
    assert rival(name).cost(224).flops == flops and flops / 1e9 == pytest.approx(gflops, rel=0.01)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(parameters, rel=0.01)


@cache
def twins(name: str) -> tuple[Program, nn.Module]:
    """A program of random weights, and a plain module of the same."""
    program, module = rival(name, seed=1), PEERS[name]().eval()
    module.load_state_dict(dict(program.weights))
    return program, module


@pytest.mark.parametrize("executor", ["reference", "eager", *OPTIONAL])
@pytest.mark.parametrize("name", ["resnet50", "repvgg_b1g4"])
def test_answers_of_plain_modules(name: str, executor: str) -> None:
    (program, module), x = twins(name), torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = module(x)
    assert expected.std() > 0.1, "the features have not vanished"
    assert relative(Engine(program, device="cpu", executor=executor)(x), expected) < 1e-5


def test_the_seed_makes_the_weights() -> None:
    first, again, other = rival("repvgg_a0"), rival("repvgg_a0"), rival("repvgg_a0", seed=1)
    assert first.digest == again.digest != other.digest


def test_unknown_network() -> None:
    with pytest.raises(ParNetError, match="resnet34, resnet50"):
        rival("resnet18")


def test_table_shows_kernels() -> None:
    lines = rival("resnet50").table().splitlines()
    assert "7x7" in lines[1] and "1x1" in lines[3]
