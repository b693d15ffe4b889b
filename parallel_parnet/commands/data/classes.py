"""Which of a network's classes is which of a folder's: by name where both have names, and never by luck."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .split import Split

SYNSET = re.compile(r"n\d{8}")  # how WordNet, and so ImageNet, names a class


class Matched(NamedTuple):
    """numbers: int64 [classes of the folder], each as the network counts it, or None where they do not fit.
    words: why, or how, in one line; empty where names agree."""

    numbers: np.ndarray | None
    words: str


def match(split: Split, labels: Sequence[str], classes: int, exactly: bool = False) -> Matched:
    """The network's numbers for a folder's classes. labels: the network's names, or none; classes: how many it has.
    exactly: whether a folder without names must have as many; a part of one may lack the last of them."""
    names = [_key(name) for name in split.classes]
    if names and labels:
        return _by_name(names, [_key(label) for label in labels], split.layout)
    if split.count > classes or ((names or exactly) and split.count != classes):
        return Matched(None, f"{split.count} classes in {split.layout}, and {classes} in the network")
    same = np.arange(split.count)
    if not names:
        return Matched(same, f"note: {split.layout} has no names of classes: its numbers are taken as the network's")
    if split.ordered:
        return Matched(same, f"note: the network has no names of classes: it is taken to count as {split.layout} does")
    if sorted(names) == sorted(map(str, same)):
        return Matched(np.asarray([int(name) for name in names]), "")
    if all(SYNSET.fullmatch(name) for name in names):
        return Matched(same, "note: the network has no names of classes: it is taken to count WordNet's in their order")
    return Matched(None, "the network has no names of classes, so nobody knows which is which: give --labels FILE")


def _by_name(names: list[str], labels: list[str], layout: str) -> Matched:
    if names == labels:
        return Matched(np.arange(len(names)), "")
    if foreign := sorted(set(names) - set(labels)):
        return Matched(None, f"{foreign[0]!r} in {layout} is none of the network's {len(labels)} classes")
    if missing := sorted(set(labels) - set(names)):
        return Matched(None, f"{missing[0]!r} of the network's {len(labels)} classes is missing in {layout}")
    if len(set(labels)) != len(labels):
        return Matched(None, "two of the network's classes have the same name: give --labels FILE")
    return Matched(np.asarray([labels.index(name) for name in names]), "")


def _key(name: str) -> str:
    return name.replace("/", "-")  # no folder can be called T-shirt/top
