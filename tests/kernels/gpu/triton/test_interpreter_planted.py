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

from parallel_parnet.kernels.gpu import fused_conv, sse_gate
from parallel_parnet.kernels.gpu import level as level_module
from parallel_parnet.kernels.gpu.convolution import Convolution
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile
from parallel_parnet.kernels.gpu.interpreter import run_order
from parallel_parnet.kernels.gpu.samples import convolution, geometry


@dataclass(frozen=True)
class Bug:
    """`old`, in a kernel's source, becomes `new`; `kind` of operation, which must then fail."""

    name: str
    old: str
    new: str
    kind: str
    split_k: int = 1
    module: ModuleType = fused_conv


COLUMN = "tap % 3 - 1) * pixel_stride"
INSIDE = "((inside[:, None] >> bit[None, :]) & 1) != 0"
BORDER = "tl.where((((inside >> tap) & 1) != 0)[:, None], border[None, :], 0.0)"
BUGS = [
    Bug("dropped border mask", INSIDE, "(inside[:, None] >= 0) & (k < K)[None, :]",
        "identity"),
    Bug("dropped channel mask", "mask_o = o < O_GROUP", "mask_o = o >= 0", "identity"),
    Bug("dropped mask of a ragged last step", "lanes = (k < K)[:, None] & mask_o", "lanes = (k >= 0)[:, None] & mask_o",
        "identity"),
    Bug("wrong tap", COLUMN, COLUMN.replace("- 1", "- 2"), "plain"),
    Bug("rows and columns of taps swapped", "(tap // 3 - 1) * s.W + tap % 3 - 1", "(tap % 3 - 1) * s.W + tap // 3 - 1",
        "plain"),
    Bug("swapped group", "(i_group * s.PART + c) * channel_stride", "((1 - i_group) * s.PART + c) * channel_stride",
        "grouped"),
    Bug("second input read as the first", "multiply(acc, x.b, 1,", "multiply(acc, x.a, 1,", "fusion"),
    Bug("second input's weights are the first's", "tap * s.CIN + i_input * s.PART + c", "tap * s.CIN + c", "fusion"),
    Bug("missing border correction", "if x.border is not None:", "if False:", "fusion"),
    Bug("border correction outside the picture", BORDER,
        "border[None, :]", "fusion"),
    Bug("wrong shuffle", "stored = (o // REST * s.GROUPS + i_group) * REST + o % REST", "stored = computed",
        "fusion_down"),
    Bug("every picture is the first", "n = i_tile // (s.GROUPS * O_TILES * s.TILES)", "n = i_tile * 0", "identity"),
    Bug("stride forgotten", "row = p // s.WOUT * s.STRIDE", "row = p // s.WOUT", "down"),
    Bug("identity without its shift", " + (shift * gate)[None, :]", "", "identity"),
    Bug("gate not doubled", "(2 * gate)[None, :]", "gate[None, :]", "plain"),
    Bug("sums of rows outside", "tl.where(mask_p[:, None], y.to(tl.float32), 0.0)", "y.to(tl.float32)", "identity"),
    Bug("sums of what was not stored", "y.to(tl.float32), 0.0)", "acc, 0.0)", "identity"),
    Bug("splits overlap", "tl.range(i_split * STEPS // s.SPLIT_K,", "tl.range(0,", "identity", split_k=2),
    Bug("release too weak", 'sem="acq_rel"', 'sem="acquire"', "identity", split_k=2),
    Bug("acquire too weak", 'sem="acq_rel"', 'sem="release"', "identity", split_k=2),
    Bug("counter not set back", "tl.store(x.counters + i_tile, 0)", "pass", "identity", split_k=2),
    Bug("splits added in order of arrival", "tile + split * PART + cells,",
        "tile + (i_split + 1 + split) % s.SPLIT_K * PART + cells,", "identity", split_k=3),
    Bug("gate of the output's pixels", "s.H * s.W, s.A_BT", "s.PIXELS, s.A_BT", "down", module=sse_gate),
    Bug("gate of the first input twice", "x.b_sums, n, channel, mask_c, s.C, s.B_TILES",
        "x.a_sums, n, channel, mask_c, s.C, s.A_TILES", "fusion", module=sse_gate),
    Bug("gate of one split only", "s.PART, SPLIT_K * s.BC", "s.PART, 2 * SPLIT_K * s.BC", "wide", module=sse_gate),
]  # fmt: skip


def planted(bug: Bug, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the level kernel run the mutated source."""
    source = Path(bug.module.__file__ or "").read_text()
    assert source.count(bug.old) == 1, f"{bug.name}: the source no longer holds this text once"
    (folder / "mutant.py").write_text(source.replace(bug.old, bug.new))
    name = f"{bug.module.__package__}._mutant"
    spec = importlib.util.spec_from_file_location(name, folder / "mutant.py")
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, mutant)
    spec.loader.exec_module(mutant)
    if bug.module is fused_conv:
        monkeypatch.setattr(level_module, "fused_conv_tile", mutant.fused_conv_tile)
    else:
        monkeypatch.setattr(fused_conv, "gate_products", mutant.gate_products)


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


def case(kind: str, split_k: int) -> Convolution:
    """Two pictures, several tiles, channels that fill none of them, as few programs as show the bugs."""
    shape = Geometry(3, 2, 520, 20) if kind == "wide" else geometry(kind, 3, 7, 20)
    dtype = torch.float32 if split_k > 1 else torch.float16  # half precision hides the order of additions
    return convolution(shape, Tile(16, 32, 64, split_k), 2, dtype, seed=7)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_is_caught(bug, tmp_path, monkeypatch):
    conv = case(bug.kind, bug.split_k)
    planted(bug, tmp_path, monkeypatch)
    with pytest.raises(
        Exception, match=r"off by|sums are not|not written|other bits|race|out of bounds|InterpreterError"
    ):
        check(conv)


@pytest.mark.parametrize(("kind", "split_k"), sorted({(bug.kind, bug.split_k) for bug in BUGS}))
def test_nothing_is_caught_without_a_bug(kind, split_k):
    check(case(kind, split_k))
