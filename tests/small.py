"""Small networks that tests share, in which every weight matters; and the released code's own answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from parallel_parnet import Config, ParNet, Program, create_model, fold, load_checkpoint
from parallel_parnet.executors.backends import ON_CPUS, lacking
from parallel_parnet.program.contract import INPUT, shapes
from parallel_parnet.program.program import Operation

GOLDEN = Path(__file__).resolve().with_name("golden")
OPTIONAL = [executor for executor in ON_CPUS if not lacking(executor)]  # that can be had here
SMALL = Config((8, 16, 32, 64), num_classes=10)


@dataclass(frozen=True)
class Golden:
    """Logits that the released code gave for an input, a checkpoint and an activation."""

    name: str
    checkpoint: Path
    activation: str
    ema: bool
    input: Tensor
    logits: Tensor

    def __str__(self) -> str:
        return self.name

    @cached_property
    def program(self) -> Program:
        return fold(load_checkpoint(self.checkpoint, ema=self.ema, activation=self.activation))


@cache
def golden_cases() -> tuple[Golden, ...]:
    """Every case in tests/golden."""
    cases = []
    for path in sorted(GOLDEN.glob("*.golden.pt")):
        content = torch.load(path, weights_only=True)
        checkpoint, activation = path.with_name(path.name.replace(".golden.pt", ".pth.tar")), content["activation"]
        for i, case in enumerate(content["cases"]):
            for key in ("logits", "logits_ema"):
                if key in case:
                    name, ema = f"{activation}-{i}-{key}", key.endswith("ema")
                    cases.append(Golden(name, checkpoint, activation, ema, case["input"], case[key]))
    return tuple(cases)


def relative(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|; not a number where either is."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def lively(config: Config | str, seed: int) -> ParNet:
    """A random network in which every weight matters: norms that scale and shift, features that do not vanish."""
    with torch.random.fork_rng(devices=[]):  # what is drawn after it is the test's own chance
        torch.manual_seed(seed)
        model = create_model(config)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                module.momentum = 1.0
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


def conv(name: str, stage: str, stream: int | None, level: int, inputs: tuple[str, ...]) -> Operation:
    """A convolution to 8 channels, of the picture or of features of 8 channels."""
    cin = 3 if inputs == (INPUT,) else 8 * len(inputs)
    return Operation(name, "conv", stage, stream, level, inputs, cin, 8, gate="plain", activation="silu")


def weightless(*operations: Operation) -> Program:
    """A program of 10 classes for those who look at operations alone: all its weights are zeros."""
    weights = {f"{op.name}.{name}": torch.zeros(shape) for op in operations for name, shape in shapes(op).items()}
    return Program(Config((8, 16), blocks=(1,), num_classes=10), operations, weights)
