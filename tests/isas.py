"""The CPU kernels by each instruction set that this CPU has, and by AMX, whose instructions are emulated on a
CPU that has the others of its object."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
ISAS = (*RUNNABLE, *(["amx"] if EMULATED else []))
UseIsa = Callable[[str], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """amx_emulator.c, compiled."""
    path = tmp_path_factory.mktemp("emulator") / "amx.so"
    flags = ["-O2", "-Wall", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, EMULATOR, "-lm", "-o", path], check=True, timeout=120)
    return ctypes.CDLL(str(path))


@pytest.fixture
def use_isa(request: pytest.FixtureRequest) -> UseIsa:
    """For as long as it is entered the kernels run with an instruction set: for tests whose networks cost more than
    what all sets of ISAS compute of them."""

    @contextmanager
    def use(name: str) -> Iterator[None]:
        emulator = None if name in RUNNABLE else request.getfixturevalue("emulator")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PARNET_ISA", name)
            if emulator:
                patch.setattr(objects, "runnable", lambda: ("amx",))
                emulator.install()
            objects.in_use.cache_clear()
            try:
                assert objects.in_use() == name
                yield
            finally:
                objects.in_use.cache_clear()
                if emulator:
                    emulator.restore()

    return use


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, use_isa: UseIsa) -> Iterator[str]:
    """The name of each instruction set in turn, with which the kernels run."""
    with use_isa(request.param):
        yield request.param
