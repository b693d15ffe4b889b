"""shared.h as Python reads it, against the compiler that reads it for the kernels."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from parallel_parnet.kernels.cpu import native, shared
from parallel_parnet.kernels.cpu.instruction_sets import HERE

COMPILER = shutil.which("cc")
OTHER = {"chunks": "kernel", "kernel": "chunks"}
INCLUDES = "#include <stddef.h>", "#include <stdio.h>", '#include "shared.h"'


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_the_compiler_agrees(tmp_path: Path) -> None:
    """On every constant, and on the place and size of every field."""
    lines = [f'printf("{name} %d\\n", {name});' for name in shared.NUMBERS]
    expected = [f"{name} {value}" for name, value in shared.NUMBERS.items()]
    for name, struct in shared.STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, *_ in struct._fields_:
            place = getattr(struct, field)
            lines.append(
                f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof(({name} *)0)->{field});'
            )
            expected.append(f"{name}.{field} {place.offset} {place.size}")
    source = tmp_path / "main.c"
    source.write_text("\n".join([*INCLUDES, "int main(void) {", *lines, "}", ""]))
    run = {"check": True, "capture_output": True, "text": True, "timeout": 60}
    subprocess.run([COMPILER, "-std=gnu11", "-Werror", f"-I{HERE}", source, "-o", tmp_path / "main"], **run)
    assert subprocess.run([tmp_path / "main"], **run).stdout.splitlines() == expected


def test_a_change_of_the_header_is_one_of_python() -> None:
    text = (HERE / "shared.h").read_text()
    before = shared.read(text).structs["Op"]
    after = shared.read(re.sub(r"\b(chunks|kernel)\b", lambda found: OTHER[found[0]], text)).structs["Op"]
    assert before.chunks.offset == after.kernel.offset != before.kernel.offset == after.chunks.offset
    assert shared.read(text.replace("{ IMPORT, GATE,", "{ GATE, IMPORT,")).numbers["GATE"] == native.IMPORT


@pytest.mark.parametrize("struct", [native.Panel, native.Op, native.Task, native.Pass])
def test_a_name_that_is_no_fields_is_refused(struct: type[ctypes.Structure]) -> None:
    """ctypes would keep it as an attribute that the kernels never see."""
    with pytest.raises(AttributeError):
        struct(channel=1)


@pytest.mark.parametrize("field", ["double step", "unsigned int n", "int32_t n : 3", "void (*work)(int)", "Op op", "n"])
def test_what_is_not_understood_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="no plain field"):
        shared.read("typedef struct { int32_t a; FIELD; } Some;".replace("FIELD", field))
