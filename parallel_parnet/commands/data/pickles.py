"""Pickles of dictionaries with numbers, texts and arrays of bytes, read without running what they name.

A pickle is a program: it may call whatever it names. Here the few names that an array is made of stand for something of
our own that only keeps what it is given, and every other name ends the reading; so does NumPy's own way to restore an
array, which trusts what it is given.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from parallel_parnet import ParNetError

MOST_BYTES = 1 << 30


class _Kept:
    """What stands for an array or its type: the arguments it was made with, and the state it was given."""

    def __init__(self, *made_with: Any) -> None:
        self.made_with, self.state = made_with, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Type(_Kept):
    pass


class _Buffer(_Kept):
    """An array as protocol 5 has it, which is Python's own choice from 3.14 on."""

    def __init__(self, values: Any, kind: Any, shape: Any, order: Any) -> None:
        held = bytes(memoryview(values))  # of a number bytes() would make as many zeros
        self.state = None, shape, kind, order != "C", held


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Kept,
    ("numpy._core.multiarray", "_reconstruct"): _Kept,
    ("numpy.core.numeric", "_frombuffer"): _Buffer,
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Type,
}


class _Reader(pickle._Unpickler):  # the one in Python: the one in C takes as much memory as a pickle asks for
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise ParNetError(f"names {module}.{name}, which loading could run")
        return ALLOWED[module, name]


def read(path: Path) -> dict[str, Any]:
    """The dictionary in a file, its arrays uint8; ParNetError for damage, and for anything else in it."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ParNetError(f"more than {MOST_BYTES} bytes")
        content = _Reader(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        if not isinstance(content, dict):
            raise ParNetError("holds no dictionary")
        return {_text(key): _value(value) for key, value in content.items()}
    except ParNetError as error:
        raise ParNetError(f"{path}: {error}") from None
    except Exception as error:  # whatever damage leads a reader of pickles to
        raise ParNetError(f"{path}: truncated, or no pickle ({type(error).__name__}: {error})") from None


def _value(value: Any) -> Any:
    if isinstance(value, _Kept):
        return _restored(value)
    if isinstance(value, list):
        return [_text(item) for item in value]
    return _text(value)


def _text(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _restored(array: _Kept) -> np.ndarray:
    _, shape, kind, in_columns, values = array.state
    if not isinstance(kind, _Type) or _text(kind.made_with[0]) != "u1" or in_columns or not isinstance(values, bytes):
        raise ParNetError("holds an array that is not of bytes, row by row")
    if not all(type(side) is int and side >= 0 for side in shape) or math.prod(shape) != len(values):
        raise ParNetError(f"holds {len(values)} bytes for an array of shape {shape}")
    return np.frombuffer(values, np.uint8).reshape(shape)
