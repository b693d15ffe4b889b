"""How to train, as data: a file of JSON in recipes/, or of one's own."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from parallel_parnet import ParNetError

RECIPES = Path(__file__).with_name("recipes")
SCHEDULES = ("cosine", "one-cycle")
AMP = (None, "bfloat16", "float16")


class RandAugment(NamedTuple):
    """magnitude: 0..10, as timm counts. std: of its scatter from picture to picture."""

    magnitude: float
    std: float


@dataclass(frozen=True)
class Recipe:
    """A training run but for its network and its pictures.

    source: where the numbers come from. models: the variants that take this recipe unless told otherwise.
    batch_size: pictures of a step, of each rank. lr: the largest learning rate. least_lr: the last, of "cosine".
    schedule: "cosine", behind a straight rise over the share `warm_up` of all steps; or "one-cycle", torch's, which
        turns the momentum the other way round. SGD with Nesterov's momentum of 0.9.
    decay_vectors: whether biases and batch norms decay as well. ema: the moving average's decay a step, 0 for none.
    amp: the type of mixed precision, or None. crop_scale: the least and largest share of a picture's area that is cut
        out and resized, or None to resize as in testing. mirror: half of the pictures. shift: by how many pixels.
    erase: the probability that a rectangle of a picture is filled with noise.
    """

    source: str
    models: tuple[str, ...]
    epochs: int
    batch_size: int
    lr: float
    least_lr: float
    schedule: str
    warm_up: float
    weight_decay: float
    decay_vectors: bool
    label_smoothing: float
    ema: float
    amp: str | None
    crop_scale: tuple[float, float] | None
    mirror: bool
    shift: int
    rand_augment: RandAugment | None
    erase: float

    def __post_init__(self) -> None:
        for name, least, most in RANGES:
            value = getattr(self, name)
            whole = name in ("epochs", "batch_size", "shift")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise ParNetError(f"{name} {value!r}: give a {'whole ' if whole else ''}number")
            if not least <= value <= most:
                raise ParNetError(f"{name} {value}: must be {least} to {most}")
        if self.schedule not in SCHEDULES or self.amp not in AMP:
            raise ParNetError(f"schedule {self.schedule!r}, amp {self.amp!r}: choose of {SCHEDULES} and {AMP}")
        if self.schedule == "one-cycle" and self.warm_up == 1:
            raise ParNetError("warm_up 1: one-cycle needs steps in which the rate falls; give less than 1")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ParNetError(f"crop_scale {self.crop_scale}: give two shares of a picture, the smaller first")

    def with_changes(self, **changes: Any) -> Recipe:
        """Another recipe, with those of the changes that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def text(self) -> str:
        """As JSON, for comparing."""
        return json.dumps(asdict(self))


RANGES = (
    ("epochs", 1, 1 << 20), ("batch_size", 2, 1 << 20), ("lr", 0, 1e6), ("least_lr", 0, 1e6), ("warm_up", 0, 1),
    ("weight_decay", 0, 1e6), ("label_smoothing", 0, 1), ("ema", 0, 1), ("shift", 0, 1 << 10), ("erase", 0, 1),
)  # fmt: skip


def names() -> list[str]:
    """Of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.json"))


def load(name: str) -> Recipe:
    """One of `names`, or a file; ParNetError where it is neither, or does not say what a recipe must say."""
    path = RECIPES / f"{name}.json" if name in names() else Path(name)
    if not os.path.isfile(path):
        raise ParNetError(f"--recipe {name}: give a file, or one of {', '.join(names())}")
    try:
        content = json.loads(path.read_text("utf-8"))
        known = {field.name for field in fields(Recipe)}
        if wrong := sorted(set(content) ^ known):
            raise ParNetError(f"{wrong[0]!r} is {'missing' if wrong[0] in known else 'no part of a recipe'}")
        augment, scale = content["rand_augment"], content["crop_scale"]
        content["models"] = tuple(content["models"])
        content["rand_augment"] = augment and RandAugment(float(augment["magnitude"]), float(augment["std"]))
        content["crop_scale"] = scale and (float(scale[0]), float(scale[1]))
        return Recipe(**content)
    except ParNetError as error:
        raise ParNetError(f"{path}: {error}") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ParNetError(f"{path}: cannot be read as a recipe ({error})") from None


def default(model: str | None) -> str:
    """The recipe of a variant; without one, that for fine-tuning."""
    return next((name for name in names() if model in load(name).models), "fine-tune")
