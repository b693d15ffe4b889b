"""The network that is trained: fresh, or a checkpoint's with a new classifier where the classes differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from parallel_parnet import Config, ParNet, ParNetError, create_model
from parallel_parnet.network.variants import variant

from ..data.classes import match
from ..data.split import Split

ADVICE = "name them by --labels FILE"


def fresh(name: str, activation: str | None, size: int | None, split: Split) -> tuple[ParNet, np.ndarray, str]:
    """A variant with random weights for the classes of `split`, its number for each of them, and a line where they have
    no names: then nobody knows that they are those of the variant."""
    config = _sized(variant(name), size)
    if activation is not None:
        config = replace(config, activation=activation)
    matched = match(split, config.labels, config.num_classes)
    if split.classes and matched.numbers is not None:
        labels = config.labels or _names(split, matched.numbers)
        return create_model(replace(config, labels=labels)), matched.numbers, ""
    words = "" if split.classes else f"note: {split.layout} has no names of classes, nor will the network; {ADVICE}"
    return create_model(_with_classes_of(split, config)), np.arange(split.count), words


def tuned(model: ParNet, size: int | None, split: Split) -> tuple[ParNet, np.ndarray, str]:
    """A checkpoint's network for the classes of `split`, its number for each of them, and a line about its classifier.

    The classifier stays where it is known to be of the same classes; else a new one takes its place, for other names.
    """
    matched = match(split, model.config.labels, model.config.num_classes, exactly=True)
    if matched.numbers is not None:
        labels = model.config.labels or _names(split, matched.numbers)
        model.config = replace(_sized(model.config, size), labels=labels)
        words = matched.words or "the checkpoint's classifier goes on: its classes are the same"
        return model, matched.numbers, words if split.classes else f"{words}; if they are not, {ADVICE}"
    model.config = _with_classes_of(split, _sized(model.config, size))
    model.head["fc"] = nn.Linear(model.config.planes[-1], split.count)
    words = f"a new classifier of {split.count} classes ({matched.words})"
    return model, np.arange(split.count), words if split.classes else f"{words}; {ADVICE}"


def check_same_classes(train: Split, test: Split) -> None:
    """ParNetError where the pictures to test on are of other classes than those to train on."""
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))[0]
        raise ParNetError(f"class {different!r} is not among the pictures of both {train.part}/ and {test.part}/")
    if test.count > train.count:
        raise ParNetError(f"class {test.count - 1} is tested and never trained")


def _sized(config: Config, size: int | None) -> Config:
    """ParNetError where the network could not take pictures of its size: training alone would not see that of some."""
    config = config if size is None else replace(config, image_size=size)
    if config.image_size % config.size_multiple:
        raise ParNetError(
            f"pictures of {config.image_size} pixels a side: the network takes multiples of {config.size_multiple}; "
            f"give one of them as --img-size"
        )
    return config


def _with_classes_of(split: Split, config: Config) -> Config:
    return replace(config, num_classes=split.count, labels=split.classes)


def _names(split: Split, numbers: np.ndarray) -> tuple[str, ...]:
    """The names of `split` as the network counts."""
    if not split.classes:
        return ()
    return tuple(split.classes[i] for i in np.argsort(numbers))
