"""AMX's instructions: that the kernels use them, and that what stands in for them knows what the manual forbids."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isas import EMULATED, EMULATOR, RUNNABLE, emulator, isa, use_isa  # noqa: F401 (fixtures)
from parallel_parnet import fold
from plans import plan_of
from small import SMALL, lively

in_emulation = pytest.mark.skipif(not EMULATED, reason="this CPU has AMX or no AVX512-BF16, or there is no compiler")
FLAGS = ["-mamx-tile", "-mamx-bf16", "-mamx-int8", "-shared", "-fPIC"]
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


AGAINST = """
#include "{emulator}"
#include <immintrin.h>
void by_cpu(const Config *shapes, void *sums, const void *x, const void *w, int bf16) {{
    _tile_loadconfig(shapes);
    _tile_loadd(0, sums, 64); _tile_loadd(1, x, 64); _tile_loadd(2, w, 64);
    if (bf16) _tile_dpbf16ps(0, 1, 2); else _tile_dpbusd(0, 1, 2);
    _tile_stored(0, sums, 64);
    _tile_release();
}}
void by_emulator(const Config *shapes, void *sums, const void *x, const void *w, int bf16) {{
    configure((const uint8_t *)shapes);
    memcpy(tiles[0], sums, 1024); memcpy(tiles[1], x, 1024); memcpy(tiles[2], w, 1024);
    multiply(0, 1, 2, bf16);
    memcpy(sums, tiles[0], 1024);
}}
"""


@in_emulation
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


@in_emulation
@pytest.mark.parametrize(
    ("bytes_", "tiles", "said"),
    [(64, "0, 1, 2", ""), (32, "0, 1, 2", "shapes that do not fit"), (64, "0, 1, 3", "a tile without a shape"),
     (68, "0, 1, 2", "shape of a tile")],
)  # fmt: skip
def test_what_the_manual_forbids(bytes_: int, tiles: str, said: str, tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text(FORBIDDEN.format(bytes=bytes_, tiles=tiles))
    subprocess.run(["cc", *FLAGS, source, EMULATOR, "-lm", "-o", tmp_path / "wrong.so"], check=True, timeout=120)
    code = "import ctypes, sys; made = ctypes.CDLL(sys.argv[1]); made.install(); made.wrong()"
    command = [sys.executable, "-c", code, str(tmp_path / "wrong.so")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode == 0) == (not said) and said in run.stderr, run.stderr


@pytest.mark.skipif("amx" not in RUNNABLE, reason="this CPU has no AMX")
@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize(("rows", "words"), [(16, 16), (14, 16), (5, 3), (1, 1)])
def test_what_is_emulated_is_what_the_cpu_does(bf16: int, rows: int, words: int, tmp_path: Path) -> None:
    """To the bit, of any values of 8 bits, and of bf16 of any size, infinite and not a number."""
    source = tmp_path / "against.c"
    source.write_text(AGAINST.format(emulator=EMULATOR))
    subprocess.run(["cc", "-O2", "-ffp-contract=off", *FLAGS, source, "-lm", "-o", tmp_path / "against.so"], check=True)
    made = ctypes.CDLL(str(tmp_path / "against.so"))
    shapes = bytearray(64)
    shapes[0], shapes[16], shapes[18], shapes[20], shapes[48:51] = 1, 64, 4 * words, 64, bytes((rows, rows, words))
    config = (ctypes.c_char * 64).from_buffer(shapes)
    for _ in range(100):
        x, w = (torch.randint(0, 256, (16, 64), dtype=torch.uint8) for _ in range(2))
        start = torch.randn(16, 16) if bf16 else torch.randint(-(2**30), 2**30, (16, 16), dtype=torch.int32)
        answers = []
        for multiply in (made.by_cpu, made.by_emulator):
            sums = start.clone()
            multiply(config, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (sums, x, w)), bf16)
            answers.append(sums[:rows])
        assert not answers[0].equal(start[:rows])
        torch.testing.assert_close(*answers, rtol=0, atol=0, equal_nan=True)
