"""shared.h, read: the numbers and structs that Python and the kernels share are written down there alone."""

from __future__ import annotations

import ctypes
import re
from typing import Any, NamedTuple

from .instruction_sets import HERE

POINTER = ctypes.c_void_p
SCALARS = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "atomic_int": ctypes.c_int, "float": ctypes.c_float}
ENUM_OR_STRUCT = re.compile(r"enum \{([^{}]*)\};|typedef struct \{([^{}]*)\} (\w+);")
FIELDS = re.compile(r"(?:const )?(\w+) (.+)")  # a type and its declarators
FIELD = re.compile(r"((?:\*|const )*)(\w+)(?:\[(\d+)\])?")


class Shared(NamedTuple):
    """What a header declares: the values of its enums' constants by their names, and its structs by theirs."""

    numbers: dict[str, int]
    structs: dict[str, type[ctypes.Structure]]


def read(text: str) -> Shared:
    """The enums and structs of C as plain as shared.h's: numbers, pointers to anything, arrays, and earlier structs.

    ValueError, with the declaration, where a field is anything else.
    """
    numbers: dict[str, int] = {}
    structs: dict[str, type[ctypes.Structure]] = {}
    for constants, fields, name in ENUM_OR_STRUCT.findall(re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)):
        if name:
            made = [field for line in fields.split(";")[:-1] for field in _fields(line, SCALARS | structs)]
            structs[name] = type(name, (ctypes.Structure,), {"_fields_": made})
        value = -1
        for constant in filter(None, constants.split(",")):
            key, _, given = constant.partition("=")
            value = int(given) if given else value + 1
            numbers[key.strip()] = value
    return Shared(numbers, structs)


def _fields(declaration: str, types: dict[str, Any]) -> list[tuple[str, Any]]:
    """What ctypes calls the fields of a declaration such as `const float *x, y[4]`: their names and types."""
    made = []
    whole = FIELDS.fullmatch(" ".join(declaration.split()))
    for declarator in whole[2].split(", ") if whole else [""]:
        field = FIELD.fullmatch(declarator)
        if whole is None or field is None or not (field[1] or whole[1] in types):
            raise ValueError(f"shared.h: {declaration.strip()}: no plain field")
        type_ = POINTER if field[1] else types[whole[1]]
        made.append((field[2], type_ * int(field[3]) if field[3] else type_))
    return made


NUMBERS, STRUCTS = read((HERE / "shared.h").read_text(encoding="utf-8"))
