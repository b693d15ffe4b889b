"""Damage as disks, networks and people do it: to bytes, to JSON, to pictures. All chance comes from one Random, so that
whatever drives it, hypothesis or a seed, makes an input again."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save

from parallel_parnet import Program
from parallel_parnet.program.program import DIGEST, FORMAT

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F")
SIZES = ((1, 1), (1, 300), (17, 16), (33, 31), (70, 2))
TEXTS = ("", "conv", "silu", "relu", "none", "plain", "head", "input", "streams.0.1", "native", "torch.float32",
         "a\nb", "\0", "\ud800", "nan", "1", "x" * 300, "[/b]", "é")  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 4, 7, 8, 32, 64, 255, 2**31, 2**32, 2**63, -(2**63), 2**64, 10**400, -(10**400), 0.0, -0.0,
           0.5, 1.0, 1e-45, 1e38, 1e39, 1e308, float("inf"), float("-inf"), float("nan"))  # fmt: skip
HEAD = 200  # bytes in which most formats say what they hold


class Forged(Program):
    """Checked by nobody, and described as its maker likes: its file has a digest that is right."""

    def __post_init__(self, original: None) -> None:
        operations = [op.described for op in self.operations]
        self.__dict__["description"] = {"config": asdict(self.config), "operations": operations}

    @classmethod
    def of(cls, program: Program) -> Forged:
        return cls(program.config, program.operations, dict(program.weights))

    def _description(self) -> dict:
        return self.__dict__["description"]

    def content(self, beside: Mapping[str, str]) -> bytes:
        """What `save` writes."""
        metadata = {"format": FORMAT, "program": json.dumps(self._description()), **beside}
        return save(dict(self.weights), metadata | {DIGEST: self._seal(metadata)})


def damaged(rng: Random, content: bytes, other: bytes) -> bytes:
    """With some bits flipped, bytes lost, doubled or overwritten, a piece of `other` in it, or its end cut off."""
    data = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(min(len(data), HEAD) if rng.random() < 0.5 else len(data)) if data else 0
        length, action = 1 << rng.randrange(8), rng.randrange(7)
        if action <= 1 and data:
            data[place] ^= 1 << rng.randrange(8)
        elif action == 2:
            data[place : place + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80"))
        elif action == 3:
            del data[place : place + length]
        elif action == 4:
            data[place:place] = data[place : place + length]
        elif action == 5 and other:
            start = rng.randrange(len(other))
            data[place : place + length] = other[start : start + length]
        elif rng.random() < 0.3:
            del data[place:]
    return bytes(data)


def any_value(rng: Random, depth: int = 2) -> Any:
    """Of any type that JSON has, with what lies at the edges of each."""
    kind = rng.randrange(7 if depth else 5)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind <= 2:
        return rng.choice(NUMBERS)
    if kind <= 4:
        return rng.choice(TEXTS)
    inside = [any_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return inside if kind == 5 else {rng.choice(TEXTS): value for value in inside}


def changed(rng: Random, tree: Any) -> Any:
    """A copy of what JSON may hold in which one value, of whatever depth, is lost, added, or another."""
    tree = json.loads(json.dumps(tree))  # tuples as lists
    found = list(_places(tree))
    path, other = rng.choice(found), rng.choice(found)
    value = deepcopy(at(tree, other)) if rng.random() < 0.3 else any_value(rng)
    if not path:
        return value
    holder, key, action = at(tree, path[:-1]), path[-1], rng.randrange(5)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, list):
        holder.insert(key, value)
    elif action == 1:
        holder[rng.choice(TEXTS)] = value
    else:
        holder[key] = value
    return tree


def at(tree: Any, path: tuple) -> Any:
    """What stands at a path of keys and indices."""
    for key in path:
        tree = tree[key]
    return tree


def _places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _places(value, (*path, key))


def picture(rng: Random) -> bytes:
    """A file of any format, mode and size that Pillow writes; mostly damaged."""
    content = _whole(*rng.choice(_writable()), rng.choice(SIZES))
    return content if rng.random() < 0.1 else damaged(rng, content, _whole(*rng.choice(_writable()), SIZES[2]))


@lru_cache(None)
def _writable() -> list[tuple[str, str]]:
    """Formats with their modes, each format as often as any other."""
    Image.init()
    found = {kind: [mode for mode in MODES if _whole(kind, mode, SIZES[2])] for kind in sorted(Image.SAVE)}
    most = max(map(len, found.values()))
    return [(kind, modes[i % len(modes)]) for kind, modes in found.items() if modes for i in range(most)]


@lru_cache(None)
def _whole(kind: str, mode: str, size: tuple[int, int]) -> bytes:
    """Empty where Pillow writes no such picture; or draws ten large ones for each (ICNS), where one mode must do."""
    if kind == "ICNS" and mode != "RGBA":
        return b""
    noise = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 4), np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010F] = 6, "maker"
    more: dict[str, Any] = (
        {"exif": exif, "xmp": b"<x:xmpmeta/>"} if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
    )
    if mode in ("1", "L", "P", "RGB") and kind in ("PNG", "GIF"):
        more["transparency"] = (1, 2, 3) if mode == "RGB" else 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.fromarray(noise).convert("L" if mode.startswith("I;") else mode.removesuffix("A") or mode)
            image.convert(mode).save(file, kind, **more)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return b""
    return file.getvalue()
