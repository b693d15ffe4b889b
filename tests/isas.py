"""The CPU kernels by each instruction set that this CPU has, and by AMX, whose instructions are emulated on a
CPU that has the others of its object."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel_parnet.kernels.cpu import objects
from parallel_parnet.kernels.cpu.instruction_sets import HERE
from small import OPTIONAL

EMULATOR = Path(__file__).parent / "kernels" / "cpu" / "amx_emulator.c"
RUNNABLE = objects.runnable() if "native" in OPTIONAL else ()
# its object needs all that avx512bf16 needs, too
EMULATED = (
    "amx" not in RUNNABLE
    and "avx512bf16" in RUNNABLE
    and (HERE / "native_amx.so").is_file()
    and shutil.which("cc") is not None
)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """amx_emulator.c, compiled."""
    path = tmp_path_factory.mktemp("emulator") / "amx.so"
    flags = ["-O2", "-Wall", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, EMULATOR, "-lm", "-o", path], check=True, timeout=120)
    return ctypes.CDLL(str(path))


@pytest.fixture(params=(*RUNNABLE, *(["amx"] if EMULATED else [])))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of each instruction set in turn, with which the kernels run."""
    monkeypatch.setenv("PARNET_ISA", request.param)
    if request.param not in RUNNABLE:
        monkeypatch.setattr(objects, "runnable", lambda: ("amx",))
        request.getfixturevalue("emulator").install()
    objects.in_use.cache_clear()
    assert objects.in_use() == request.param
    yield request.param
    objects.in_use.cache_clear()
    if request.param not in RUNNABLE:
        request.getfixturevalue("emulator").restore()
