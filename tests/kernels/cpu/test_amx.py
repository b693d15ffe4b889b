"""AMX's instructions: that the kernels use them, and that what stands in for them knows what the manual forbids."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isas import EMULATED, EMULATOR, emulator, isa  # noqa: F401 (fixtures)
from parallel_parnet import fold
from plans import plan_of
from small import SMALL, lively

pytestmark = pytest.mark.skipif(not EMULATED, reason="this CPU has AMX or no AVX512-BF16, or there is no compiler")
FORBIDDEN = """
#include <immintrin.h>
struct {{ unsigned char palette, start, unused[14]; unsigned short bytes[16]; unsigned char rows[16]; }} shapes = {{1}};
void wrong(void) {{
    for (int i = 0; i < 3; i++) shapes.bytes[i] = {bytes}, shapes.rows[i] = 16;
    _tile_loadconfig(&shapes);
    _tile_zero(0); _tile_zero(1); _tile_zero(2);
    _tile_dpbf16ps({tiles});
}}
"""


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("isa", ["amx"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_narrow_types_are_made_by_tiles(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    program = fold(lively(SMALL, 3))
    plan = plan_of(program, (1, 3, 64, 64), 2, dtype)
    done = request.getfixturevalue("emulator").done
    before = done()
    plan(torch.randn(1, 3, 64, 64))
    assert (done() > before) == (dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("bytes_", "tiles", "said"),
    [(64, "0, 1, 2", ""), (32, "0, 1, 2", "shapes that do not fit"), (64, "0, 1, 3", "a tile without a shape"),
     (68, "0, 1, 2", "shape of a tile")],
)  # fmt: skip
def test_what_the_manual_forbids(bytes_: int, tiles: str, said: str, tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text(FORBIDDEN.format(bytes=bytes_, tiles=tiles))
    flags = ["-mamx-tile", "-mamx-bf16", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, source, EMULATOR, "-lm", "-o", tmp_path / "wrong.so"], check=True, timeout=120)
    code = "import ctypes, sys; made = ctypes.CDLL(sys.argv[1]); made.install(); made.wrong()"
    command = [sys.executable, "-c", code, str(tmp_path / "wrong.so")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode == 0) == (not said) and said in run.stderr, run.stderr
