"""Dataclasses that hold what their annotations say, whoever fills them: a file of JSON, or an argument."""

from __future__ import annotations

from dataclasses import is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from parallel_parnet import ParNetError

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class Typed:
    """For a dataclass whose fields are of bool, int, float, str, Literal, tuple, another such dataclass or None.

    Lists become tuples, and dictionaries dataclasses. Annotated[int or float, least, most] says which numbers a field
    takes. ParNetError, naming it, for a field that holds anything else.
    """

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            object.__setattr__(self, name, held(name, getattr(self, name), kind))


def held(name: str, value: Any, kind: Any) -> Any:
    """The value of a field called `name` as the annotation `kind` has it; ParNetError where it is no such value."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # of something and None
        return None if value is None else held(name, value, inside[0])
    if origin is Annotated:
        held(name, value, inside[0])
        if not inside[1] <= value <= inside[2]:
            raise ParNetError(f"{name} {value}: must be {inside[1]} to {inside[2]}")
        return value
    if is_dataclass(kind):
        return value if isinstance(value, kind) else _made(name, value, kind)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inside[:1] * len(value) if inside[-1] is Ellipsis else inside
        if len(kinds) == len(value):
            return tuple(held(name, item, of) for item, of in zip(value, kinds, strict=True))
    elif type(value) in ((int, float) if kind is float else (kind,)) or (origin is Literal and value in inside):
        return value
    raise ParNetError(f"{name} {value!r}: give {_words(kind)}")


def _made(name: str, value: Any, kind: Any) -> Any:
    """A dataclass of a dictionary that has its fields, neither more nor fewer."""
    known = get_type_hints(kind)
    if not isinstance(value, dict):
        raise ParNetError(f"{name} {value!r}: give {_words(kind)}")
    if wrong := sorted(value.keys() ^ known.keys()):
        raise ParNetError(f"{wrong[0]!r} is {'missing in' if wrong[0] in known else 'no part of'} {name}")
    return kind(**value)


def _words(kind: Any) -> str:
    """Of which values are held."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _words(inside[0])
    if origin is Literal:
        return f"one of {', '.join(map(repr, inside))}"
    if origin is tuple:
        return f"a list of {'' if inside[-1] is Ellipsis else f'{len(inside)}, each '}{_words(inside[0])}"
    return f"an object of {', '.join(get_type_hints(kind))}" if is_dataclass(kind) else WORDS[kind]
