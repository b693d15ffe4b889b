"""Which network is trained: a fresh one, or a checkpoint's with its own classifier or a new one; for which sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from labelled import mnist
from parallel_parnet import Config, ParNetError, create_model, fold, load_checkpoint
from parallel_parnet.commands.data.classes import match
from parallel_parnet.commands.data.finding import open_split
from parallel_parnet.commands.data.split import TRAIN
from parallel_parnet.commands.train.made_up import draw
from parallel_parnet.commands.train.network import fresh, tuned
from parallel_parnet.network.variants import VARIANTS

CHECKPOINT = ROOT / "launch" / "demo" / "parnet_fashion.safetensors"


def test_classifiers(tmp_path: Path) -> None:
    draw(tmp_path / "shapes", {"train": 1})
    shapes, digits = open_split(tmp_path / "shapes", TRAIN), open_split(mnist(tmp_path / "m", 10, 1), TRAIN)
    model, numbers, words = tuned(load_checkpoint(CHECKPOINT), 64, shapes)
    assert (model.config.labels, model.config.num_classes) == (("disc", "square", "triangle"), 3)
    assert model.config.image_size == 64 and words.startswith("a new classifier of 3 classes")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3) and numbers.tolist() == [0, 1, 2]
    old = load_checkpoint(CHECKPOINT)
    kept, numbers, words = tuned(load_checkpoint(CHECKPOINT), None, digits)
    assert torch.equal(kept.head["fc"].weight, old.head["fc"].weight) and kept.config.labels == old.config.labels
    assert "taken as the network's; if they are not, name them by --labels FILE" in words
    turned = replace(shapes, classes=("triangle", "disc", "square"))
    again, numbers, words = tuned(model, None, turned)
    assert again.config.labels == ("disc", "square", "triangle") and numbers.tolist() == [2, 0, 1]
    assert "goes on" in words
    assert fresh("parnet_cifar_1m", "relu", None, shapes)[0].config.num_classes == 3


def test_classes_without_names_take_none_from_a_network(tmp_path: Path) -> None:
    digits, few = (open_split(mnist(tmp_path / str(count), count, 1), TRAIN) for count in (10, 7))
    model, numbers, words = fresh("parnet_fashion", None, None, digits)
    assert (model.config.labels, len(numbers)) == ((), 10) and words.endswith("name them by --labels FILE")
    assert fresh("parnet_s", None, 32, digits)[0].config.num_classes == 10
    named = digits.named(VARIANTS["parnet_fashion"].labels)
    model, _, words = fresh("parnet_fashion", None, None, named)
    assert model.config.labels == named.classes and not words
    model, numbers, words = tuned(load_checkpoint(CHECKPOINT), None, few)
    assert (model.config.labels, model.config.num_classes, len(numbers)) == ((), 7, 7)
    assert "7 classes (7 classes in MNIST's layout, and 10 in the network); name them by --labels FILE" in words
    assert match(few, load_checkpoint(CHECKPOINT).config.labels, 10).numbers is not None, "for testing it is enough"


@pytest.mark.parametrize(("streams", "size", "multiple"), [(3, 48, 32), (3, 50, 32), (4, 96, 64), (4, None, 64)])
def test_sizes_that_the_network_would_not_take(streams: int, size: int | None, multiple: int, tmp_path: Path) -> None:
    """Some go through training, which is no proof that the engine takes them."""
    draw(tmp_path / "shapes", {"train": 1})
    shapes = open_split(tmp_path / "shapes", TRAIN)
    model = create_model(Config((8, 16, 32, 32, 64)[: streams + 1], (1,) * streams))
    assert model.config.size_multiple == fold(model.eval()).size_multiple == multiple
    with pytest.raises(ParNetError, match=f"{size or 224} pixels a side: the network takes multiples of {multiple}"):
        tuned(model, size, shapes)
    with pytest.raises(ParNetError, match="the network takes multiples of 32"):
        fresh("parnet_fashion", None, 48, shapes)
