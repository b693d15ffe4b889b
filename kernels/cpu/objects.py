"""The compiled objects of native.c: those that this CPU can run, and the one that runs."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from ...errors import ParNetError
from .instruction_sets import HERE, MACHINE, SETS, sources

# pip and uv keep the wheel that they have made, and install that again unless they are told
REMEDY = (
    "with gcc 11 or later, install parallel_parnet again, by pip install --no-deps --no-cache-dir --force-reinstall, "
    "by uv pip install --no-cache --reinstall-package parallel_parnet, or in a clone by "
    "python setup.py build_ext --inplace"
)


class NotCompiledError(ParNetError):
    """There is no object that can run here."""


@cache
def in_use() -> str:
    """The instruction set whose object runs: the best that can, or the one that PARNET_ISA names. ParNetError where
    that one cannot run here; NotCompiledError where none can."""
    names, wanted = runnable(), os.environ.get("PARNET_ISA")
    if not wanted:
        return names[0]
    if wanted in names:
        return wanted
    if wanted not in {known.name for known in SETS[MACHINE]}:
        reason = "there is no such instruction set"
    else:
        reason = "this CPU lacks it" if _path(wanted).is_file() else "it was not compiled"
    raise ParNetError(f"PARNET_ISA={wanted}: {reason}; choose one of {', '.join(names)}")


@cache
def runnable() -> tuple[str, ...]:
    """The instruction sets that this CPU and its system have, and that were compiled, best first. NotCompiledError
    where none was."""
    sets = SETS.get(MACHINE)
    if sets is None:
        raise NotCompiledError(f"the CPU kernels are for {' and '.join(SETS)}, and this is {MACHINE}")
    has = load(sets[-1].name).cpu_has
    return tuple(s.name for s in sets if _path(s.name).is_file() and all(has(need.encode()) for need in s.needs))


@cache
def load(name: str) -> ctypes.CDLL:
    """An instruction set's object. NotCompiledError where there is none, of these sources, that can be loaded."""
    path = _path(name)
    if not path.is_file():
        lacks = f"{path.name} of the CPU kernels was" if any(HERE.glob("*.so")) else "the CPU kernels were"
        raise NotCompiledError(f"{lacks} not compiled: {REMEDY}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NotCompiledError(f"the CPU kernels cannot be loaded: {error}") from None
    library.sources.restype = ctypes.c_char_p
    if library.sources() != sources().encode():  # which other structs would read
        raise NotCompiledError(f"{path.name} was compiled from other sources: {REMEDY}")
    return library


def _path(name: str) -> Path:
    return HERE / f"native_{name}.so"
