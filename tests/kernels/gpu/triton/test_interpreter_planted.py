"""Bugs planted in the kernels' source text, each of which the tests must catch.

One cannot show here: the interpreter runs a program as one thread, so it does not miss the barrier before the release.
Tests of the compiled code look for that.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_interpreter import assert_matches_twin
from triton.runtime.errors import InterpreterError

from cases import drawn
from parallel_parnet.kernels.gpu import fused_conv, sse_gate
from parallel_parnet.kernels.gpu import level as level_module
from parallel_parnet.kernels.gpu.convolution import E4M3, Convolution
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile
from parallel_parnet.kernels.gpu.interpreter import run_order
from parallel_parnet.kernels.gpu.samples import convolution, geometry


@dataclass(frozen=True)
class Bug:
    """`old`, in a kernel's source, becomes `new`; `kind` of operation, in `dtype` or half precision, which must then
    fail."""

    name: str
    old: str
    new: str
    kind: str
    split_k: int = 1
    module: ModuleType = fused_conv
    dtype: torch.dtype | None = None


TAP = "((tap // m.kernel - m.kernel // 2) * s.w + tap % m.kernel - m.kernel // 2) * s.c_padded"
SWAPPED = "((tap % m.kernel - m.kernel // 2) * s.w + tap // m.kernel - m.kernel // 2) * s.c_padded"
SPLIT = "(i_split * s.steps // s.split_k, (i_split + 1) * s.steps // s.split_k):\n            tap = step %"
RAISED = 'n, i_o)\n            tl.debug_barrier()\n            tl.atomic_add(x.flags + i_flag, 1, sem="release"'
ARRIVES = 'x.arrived + i_flag, 1, sem="acq_rel"'
BORDER = "tl.where(near(rows, columns, tap, m)[:, None], border[None, :], 0.0)"
BUGS = [
    Bug("dropped border mask", "mask=inside[:, None] & there", "mask=(pixel >= 0)[:, None] & there", "identity"),
    Bug("dropped mask of pixels", "tl.where(p < s.pixels, offsets_inside(row, s.h, m), 0)",
        "offsets_inside(row, s.h, m)", "identity"),
    Bug("a neighbour beyond the edge", "(position + away < size)", "(position + away - 1 < size)", "identity"),
    Bug("dropped channel mask", "mask_o = o < s.group\n", "mask_o = o >= 0\n", "identity"),
    Bug("dropped mask of a ragged last step", "there = lane + c0 < s.part_padded", "there = lane + c0 >= 0",
        "identity"),
    Bug("wrong tap", TAP, TAP.replace("tap % m.kernel - ", "tap % m.kernel - 1 - "), "plain"),
    Bug("rows and columns of taps swapped", TAP, SWAPPED, "plain"),
    Bug("swapped group", "i_group * (s.part // m.align * m.align)\n", "(1 - i_group) * (s.part // m.align * m.align)\n",
        "grouped"),
    Bug("second input read as the first", "tl.where(i_input == 0, x.a, x.b)", "x.a", "fusion"),
    Bug("second input's weights are the first's", "(i_o * s.inputs + i_input).to(tl.int64)",
        "(i_o * s.inputs + 0 * i_input).to(tl.int64)", "fusion"),
    Bug("swapped blocks of weights", "weight + step * (m.bk * m.bn) + block, mask=there",
        "weight + (step ^ 1) % s.steps * (m.bk * m.bn) + block, mask=there", "identity"),
    Bug("missing border correction", "if s.bordered == 1:", "if s.bordered == 7:", "fusion"),
    Bug("border correction outside the picture", BORDER, "border[None, :]", "fusion"),
    Bug("wrong shuffle", "stored = (o // s.rest * s.groups + i_group) * s.rest + o % s.rest", "stored = computed",
        "fusion_down"),
    Bug("every picture is the first", "n = i_tile // (s.groups * s.columns * s.tiles)", "n = i_tile * 0", "identity"),
    Bug("stride forgotten", "row = p // s.wout * s.stride", "row = p // s.wout", "down"),
    Bug("identity without its shift", "(bias + shift * gate)[None, :]", "bias[None, :]", "identity"),
    Bug("gate not doubled", "acc * (2 * gate)[None, :]", "acc * gate[None, :]", "plain"),
    Bug("bias not doubled", "(bias * 2 * gate)[None, :]", "(bias * gate)[None, :]", "plain"),
    Bug("sums of rows outside", "tl.where(mask_p[:, None], y.to(tl.float32), 0.0)", "y.to(tl.float32)", "identity"),
    Bug("sums of what was not stored", "y.to(tl.float32), 0.0)", "acc, 0.0)", "identity"),
    Bug("padding that leaks", "mask_o = o < tl.where(s.groups == 1, s.cout_padded,",
        "mask_o = o < tl.where(s.groups == 1, s.cout,", "identity"),
    Bug("padding of groups that leaks", "lanes = mask_p[:, None] & (behind < s.cout_padded)[None, :]",
        "lanes = mask_p[:, None] & (behind < 0)[None, :]", "grouped"),
    Bug("splits overlap", SPLIT, SPLIT.replace("i_split * s.steps // s.split_k, ", "0, "), "identity", split_k=2),
    Bug("release too weak", 'sem="acq_rel"', 'sem="acquire"', "identity", split_k=2),
    Bug("acquire too weak", 'sem="acq_rel"', 'sem="release"', "identity", split_k=2),
    Bug("counter not set back", "tl.store(x.counters + i_tile, 0)", "pass", "identity", split_k=2),
    Bug("splits added in order of arrival", "tile + (first + split) * PART + cells, mask=there",
        "tile + (i_split + 1 + first + split) % s.split_k * PART + cells, mask=there", "identity", split_k=3),
    Bug("a third split forgotten", "range(0, s.split_k, 2)", "range(0, 1)", "identity", split_k=3),
    Bug("gate of the output's pixels", "source, n, channel, mask_c, s.c_padded, tiles, s.h * s.w",
        "source, n, channel, mask_c, s.c_padded, tiles, s.pixels", "down", module=sse_gate),
    Bug("gate of the first input twice", "tl.where(i_input == 0, x.a_sums, x.b_sums)", "x.a_sums", "fusion",
        module=sse_gate),
    Bug("gate of the first part only", "s.part + c)[:, None] * s.cout_padded",
        "s.part + c % PART)[:, None] * s.cout_padded", "wide", module=sse_gate),
    Bug("parts beyond the thirtieth forgotten", "range(0, s.parts, PARTS)", "range(0, 1)", "wide", module=sse_gate),
    Bug("a dropped flag", "- launch < 0", "- launch < -9", "identity", module=sse_gate),
    Bug("gate acquired too weakly", "flag, 0, sem=\"acquire\"", "flag, 0, sem=\"relaxed\"", "identity",
        module=sse_gate),
    Bug("gate released too weakly", RAISED, RAISED.replace("release", "relaxed"), "identity", module=sse_gate),
    Bug("parts released too weakly", ARRIVES, ARRIVES.replace("acq_rel", "acquire"), "wide", module=sse_gate),
    Bug("parts acquired too weakly", ARRIVES, ARRIVES.replace("acq_rel", "release"), "wide", module=sse_gate),
    Bug("arrivals not set back", "tl.store(x.arrived + i_flag, 0)", "pass", "identity", module=sse_gate),
    Bug("launches not counted", "tl.store(x.passes + i_tile, launch)", "pass", "identity"),
    Bug("another picture's flag", "x.flags + (n * (s.groups * s.columns) + i_o)", "x.flags + i_o", "identity",
        module=sse_gate),
    Bug("the first part of a picture's sums is enough", "- launch * s.parts < 0", "- launch < 0", "broad",
        module=sse_gate),
    Bug("residual dropped", "added.to(tl.float32) + bias", "bias", "residual"),
    Bug("residual of the first group", "s.cout_padded + computed[None, :]", "s.cout_padded + o[None, :]", "fours"),
    Bug("outer taps missed", "tl.static_range(1, half + 1)", "tl.static_range(1, half)", "wide_picture"),
    Bug("activation where there is none", 'elif m.activation == "relu"', "else", "projection"),
    Bug("steps of weights dropped", "acc *= weight_step[None, :]", "pass", "plain", dtype=E4M3),
    Bug("steps of the first group's weights", "x.weight_step + computed", "x.weight_step + o", "grouped", dtype=E4M3),
    Bug("steps of weights not those of a tile", "x.weight_step + computed, mask=mask_o, other=0.0",
        "x.weight_step + o * 0, mask=mask_o, other=0.0", "identity", dtype=E4M3),
    Bug("steps of what is stored dropped", "acc *= (1 / step)[None, :]", "pass", "plain", dtype=E4M3),
    Bug("values multiplied by their steps", "acc *= (1 / step)[None, :]", "acc *= step[None, :]", "plain", dtype=E4M3),
    Bug("steps in the order of computation", "x.step + places(i_group, o, s, m)", "x.step + computed", "fusion_down",
        dtype=E4M3),
    Bug("sums without their steps", "axis=0) * step", "axis=0)", "down", dtype=E4M3),
    Bug("blocks of weights across", "lane[:, None] + tl.arange(0, m.bn)[None, :] * m.bk",
        "lane[:, None] * m.bn + tl.arange(0, m.bn)[None, :]", "plain", dtype=E4M3),
    Bug("places of bytes that leak", "16 if in_fp8 else 8", "8", "grouped", dtype=E4M3),
]  # fmt: skip


CAUGHT = (
    "off by|sums are not|not written|not zero|not set back|other bits|race|out of bounds|InterpreterError|DID NOT RAISE"
)


def source_of(bug: Bug) -> str:
    return Path(bug.module.__file__ or "").read_text()


def planted(bug: Bug, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the level kernel run the mutated source."""
    source = source_of(bug)
    (folder / "mutant.py").write_text(source.replace(bug.old, bug.new))
    name = f"{bug.module.__package__}._mutant"
    spec = importlib.util.spec_from_file_location(name, folder / "mutant.py")
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, mutant)
    spec.loader.exec_module(mutant)
    for module, name in (
        (level_module, "fused_conv_tile"), (level_module, "lead"), (fused_conv, "gates"),
    ):  # fmt: skip
        if hasattr(mutant, name):
            monkeypatch.setattr(module, name, getattr(mutant, name))


def check(conv: Convolution) -> None:
    """What the other tests ask of a convolution: the twin's answer, twice, and the same bits in any order."""
    launch = level_module.level([conv])
    launch()
    assert_matches_twin(conv)
    first = conv.x.y.clone()
    for order in range(2):
        conv.x.y.fill_(float("nan"))
        with run_order(order):
            launch()
        assert torch.equal(conv.x.y, first), "other bits in another order"
    if conv.shape.gate == "none":
        return
    with run_order(0, leaders_last=True), pytest.raises(InterpreterError, match="deadlock"):
        launch()


def case(kind: str, split_k: int, dtype: torch.dtype | None) -> Convolution:
    """Two pictures, several tiles, channels that fill none of them, as few programs as show the bugs."""
    others = {"wide": Geometry(3, 2, 2100, 20), "broad": Geometry(1, 2100, 3, 20, stride=2, planar=True)}
    shape = others.get(kind) or geometry(kind, 3, 7, 20)
    dtype = dtype or (torch.float32 if split_k > 1 else torch.float16)  # half precision hides the order of additions
    return convolution(shape, Tile(64 if kind == "broad" else 16, 32, 64, split_k), 2, dtype, seed=7)


def test_each_has_its_place() -> None:
    """Once in the source; also those that another run plants."""
    assert [bug.name for bug in BUGS if source_of(bug).count(bug.old) != 1] == []


@pytest.mark.parametrize("bug", drawn(BUGS, 1 / 2), ids=lambda bug: bug.name)
def test_is_caught(bug, tmp_path, monkeypatch):
    conv = case(bug.kind, bug.split_k, bug.dtype)
    planted(bug, tmp_path, monkeypatch)
    with pytest.raises((Exception, pytest.fail.Exception), match=CAUGHT):
        check(conv)


@pytest.mark.parametrize(
    ("kind", "split_k", "dtype"),
    drawn(dict.fromkeys((bug.kind, bug.split_k, bug.dtype) for bug in BUGS), 1 / 3),
    ids=str,
)
def test_nothing_is_caught_without_a_bug(kind, split_k, dtype):
    check(case(kind, split_k, dtype))
