"""What a recipe says: its file, the rates of its steps, how pictures are varied or made up, and which weights decay."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from parallel_parnet import ParNetError, create_model
from parallel_parnet.commands.train import made_up
from parallel_parnet.commands.train import recipe as recipes
from parallel_parnet.commands.train.augment import decoded, erased, mirrored_and_moved
from parallel_parnet.commands.train.loop import _schedule, parameter_groups
from parallel_parnet.commands.train.made_up import picture
from parallel_parnet.commands.train.rand_augment import rand_augment
from parallel_parnet.commands.train.recipe import RandAugment
from parallel_parnet.network.variants import VARIANTS
from parallel_parnet.preprocess import Preprocess
from small import SMALL


def test_recipes() -> None:
    for name in recipes.names():
        assert recipes.load(name).source
    assert [recipes.default(model) for model in ("parnet_s", "parnet_xl", "parnet_cifar_15m", None)] == [
        "imagenet", "imagenet-large", "cifar", "fine-tune",
    ]  # fmt: skip
    assert all(recipes.default(model) != "fine-tune" for model in VARIANTS)


def test_recipes_that_say_something_else(tmp_path: Path) -> None:
    """One line for each that says what is wrong, and what would be right."""
    path, good = tmp_path / "r.json", json.loads((recipes.RECIPES / "imagenet.json").read_text())
    augment, nan = {"magnitude": 9, "std": 0.5}, float("nan")
    for change, says in (
        ({"epochs": 1.5}, "epochs 1.5: give a whole number"), ({"epochs": True}, "epochs True: give a whole number"),
        ({"lr": "fast"}, "lr 'fast': give a number"), ({"lr": 1e-6}, "least_lr 1e-05: above lr 1e-06"),
        ({"x": 1}, "'x' is no part of a recipe"), ({"schedule": "step"}, "'step': give one of 'cosine', 'one-cycle'"),
        ({"amp": "half"}, "amp 'half': give one of 'bfloat16', 'float16'"),
        ({"ema": 2}, "ema 2: must be 0 to 1"), ({"ema": 1}, "ema 1: the average would stay"),
        ({"mirror": "false"}, "mirror 'false': give true or false"), ({"mirror": None}, "mirror None: give true"),
        ({"decay_vectors": "no"}, "decay_vectors 'no': give true or false"),
        ({"source": 1}, "source 1: give a text"), ({"models": "parnet_s"}, "models 'parnet_s': give a list of a text"),
        ({"models": [1]}, "models 1: give a text"), ({"crop_scale": [0.5]}, "give a list of 2, each a number"),
        ({"crop_scale": [0.1, 0.5, 1]}, "give a list of 2, each a number"), ({"crop_scale": [0.5, 2]}, "must be 0 to"),
        ({"crop_scale": [1, 0.5]}, "the smaller first"), ({"crop_scale": "ab"}, "crop_scale 'ab': give a list of 2"),
        *(({"rand_augment": value}, "give an object of magnitude, std") for value in (False, [], [9, 0.5], "m9")),
        ({"rand_augment": {}}, "'magnitude' is missing in rand_augment"),
        ({"rand_augment": augment | {"layers": 2}}, "'layers' is no part of rand_augment"),
        *(({"rand_augment": augment | {"magnitude": value}}, "must be 0 to 10") for value in (-5, 30, nan)),
        ({"rand_augment": augment | {"std": True}}, "std True: give a number"),
    ):  # fmt: skip
        path.write_text(json.dumps(good | change))
        with pytest.raises(ParNetError, match=says) as error:
            recipes.load(str(path))
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    for content in ("[]", "{", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ParNetError, match=r"give an object of source, models|cannot be read as a recipe"):
            recipes.load(str(path))


@pytest.mark.parametrize(("warm_up", "steps"), [(0, 10), (0.1, 10), (0.2, 5), (1 / 3, 3), (1 / 49, 49), (0.999, 7)])
def test_any_warm_up_of_one_cycle(warm_up: float, steps: int) -> None:
    recipe = recipes.load("fashion").with_changes(warm_up=warm_up, lr=1.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0, momentum=0.9)
    schedule, rates = _schedule(optimizer, recipe, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1 / 25 if warm_up else 0.976, abs=1e-3) and max(rates) <= 1 and rates[-1] < 0.05
    with pytest.raises(ParNetError, match="warm_up 1: one-cycle needs steps in which the rate falls; give less than 1"):
        recipe.with_changes(warm_up=1)


def test_half_a_wave_behind_a_straight_rise() -> None:
    recipe = recipes.load("imagenet").with_changes(warm_up=0.2, lr=2.0, least_lr=0.2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 2.0)
    schedule, rates = _schedule(optimizer, recipe, 10), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0, 2.0, *(0.2 + 0.9 * (1 + math.cos(math.pi * i / 8)) for i in range(8))])


def test_pictures_are_varied_by_their_key_alone() -> None:
    preprocess, recipe = (
        Preprocess.of(SMALL, 32),
        recipes.load("imagenet").with_changes(rand_augment=RandAugment(9, 0.5)),
    )
    image = picture(3, Random(0))
    keys = [f"0 1 {i}" for i in range(40)]
    first, second = ([decoded(image, recipe, preprocess, Random(key)) for key in keys] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({pixels.tobytes() for pixels in first}) == len(keys)
    assert all(pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 for pixels in first)
    changed = [rand_augment(image, RandAugment(9, 0.5), Random(key), (0, 0, 0)) is not image for key in keys]
    assert 20 < sum(changed) < len(keys), "each of two changes is done to every other picture"
    tall = decoded(Image.new("RGB", (1, 900)), recipe, preprocess, Random(1))
    assert tall.shape == (32, 32, 3)


def test_moving_mirroring_and_erasing() -> None:
    torch.manual_seed(0)
    pixels = torch.arange(1, 28, dtype=torch.uint8).view(1, 3, 3, 3).expand(50, 3, 3, 3)
    moved = mirrored_and_moved(pixels, True, 1)
    assert len({tuple(row.flatten().tolist()) for row in moved}) > 10  # of 18
    assert torch.equal(mirrored_and_moved(pixels, False, 0), pixels)
    mirrored = {tuple(row.flatten().tolist()) for row in mirrored_and_moved(pixels, True, 0)}
    assert mirrored == {tuple(row.flatten().tolist()) for row in (pixels[0], pixels[0].flip(1))}, "left to right"
    x = torch.zeros(400, 3, 16, 16)
    touched = erased(x, 0.25).flatten(1).ne(0).float().mean(1)
    assert 70 < (touched > 0).sum() < 130 and touched.max() < 0.4
    assert x.unique().numel() > 2000, "with noise, and no colour"


def test_biases_and_norms_do_not_decay() -> None:
    recipe, model = recipes.load("cifar"), create_model(SMALL)
    groups = parameter_groups(model, recipe)
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    assert all(p.ndim == 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_made_up_pictures_by_their_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(made_up, "COUNTS", {"train": 2, "val": 1})
    monkeypatch.setattr(sys, "argv", ["made_up", str(tmp_path / "shapes")])
    assert made_up.main() == 0 and "6 in" in capsys.readouterr().out
    assert len(list(tmp_path.glob("shapes/val/*/*.png"))) == 3
    for wrong in ([], ["--help-me"], [__file__], ["/proc/shapes"]):
        monkeypatch.setattr(sys, "argv", ["made_up", *wrong])
        with pytest.raises(ParNetError):
            made_up.main()
