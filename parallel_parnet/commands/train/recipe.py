"""How to train, as data: a file of JSON in recipes/, or of one's own."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from parallel_parnet import ParNetError

from .typed import Typed, held

RECIPES = Path(__file__).with_name("recipes")
Rate = Annotated[float, 0, 1e6]
Share = Annotated[float, 0, 1]


@dataclass(frozen=True)
class RandAugment(Typed):
    """magnitude: as timm counts. std: of its scatter from picture to picture."""

    magnitude: Annotated[float, 0, 10]
    std: Annotated[float, 0, 10]


@dataclass(frozen=True)
class Recipe(Typed):
    """A training run but for its network and its pictures.

    source: where the numbers come from. models: the variants that take this recipe unless told otherwise.
    batch_size: pictures of a step, of each rank. lr: the largest learning rate. least_lr: the last, of "cosine".
    schedule: "cosine", behind a straight rise over the share `warm_up` of all steps; or "one-cycle", torch's, which
        turns the momentum the other way round. SGD with Nesterov's momentum of 0.9.
    decay_vectors: whether biases and batch norms decay as well. ema: the moving average's decay a step, 0 for none. It
        warms up, as (1 + n) / (10 + n) after n steps for as long as that is less, so that a short run averages too.
    amp: the type of mixed precision, or None. crop_scale: the least and largest share of a picture's area that is cut
        out and resized, or None to resize as in testing. mirror: half of the pictures. shift: by how many pixels.
    erase: the probability that a rectangle of a picture is filled with noise.
    """

    source: str
    models: tuple[str, ...]
    epochs: Annotated[int, 1, 1 << 20]
    batch_size: Annotated[int, 2, 1 << 20]
    lr: Rate
    least_lr: Rate
    schedule: Literal["cosine", "one-cycle"]
    warm_up: Share
    weight_decay: Rate
    decay_vectors: bool
    label_smoothing: Share
    ema: Share
    amp: Literal["bfloat16", "float16"] | None
    crop_scale: tuple[Share, Share] | None
    mirror: bool
    shift: Annotated[int, 0, 1 << 10]
    rand_augment: RandAugment | None
    erase: Share

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule == "one-cycle" and self.warm_up == 1:
            raise ParNetError("warm_up 1: one-cycle needs steps in which the rate falls; give less than 1")
        if self.ema == 1:
            raise ParNetError("ema 1: the average would stay what it begins with; give less than 1, or 0 for none")
        if self.least_lr > self.lr:
            raise ParNetError(f"least_lr {self.least_lr}: above lr {self.lr}; the rate falls from lr to least_lr")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ParNetError(f"crop_scale {list(self.crop_scale)}: give two shares above 0, the smaller first")

    def with_changes(self, **changes: Any) -> Recipe:
        """Another recipe, with those of the changes that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def text(self) -> str:
        """As JSON, for comparing."""
        return json.dumps(asdict(self))


def names() -> list[str]:
    """Of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.json"))


def load(name: str) -> Recipe:
    """One of `names`, or a file; ParNetError where it is neither, or does not say what a recipe must say."""
    path = RECIPES / f"{name}.json" if name in names() else Path(name)
    if not os.path.isfile(path):
        raise ParNetError(f"--recipe {name}: give a file, or one of {', '.join(names())}")
    try:
        return held("a recipe", json.loads(path.read_text("utf-8")), Recipe)
    except ParNetError as error:
        raise ParNetError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ParNetError(f"{path}: cannot be read as a recipe ({error})") from None


def default(model: str | None) -> str:
    """The recipe of a variant; without one, that for fine-tuning."""
    return next((name for name in names() if model in load(name).models), "fine-tune")
