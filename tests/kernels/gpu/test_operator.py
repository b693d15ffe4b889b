"""The operator under torch's own checks, torch.compile and torch.export; and what bad arguments get."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from parallel_parnet import ParNetError
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile
from parallel_parnet.kernels.gpu.operator import fused_conv
from parallel_parnet.kernels.gpu.packing import pack_gate_weight, pack_weight

OP = torch.ops.parallel_parnet.fused_conv


def arguments(identity: bool = True, two: bool = False, dtype: torch.dtype = torch.float32) -> dict:
    torch.manual_seed(0)
    c, o = 8, 8 if identity else 12
    rows = c * (2 if two else 1)
    shape = Geometry(7, 5, rows, o, inputs=2 if two else 1)
    return {
        "a": torch.randn(2, 7, 5, c).to(dtype), "b": torch.randn(2, 7, 5, c).to(dtype) if two else None,
        "a_sums": torch.randn(2, 3, c), "b_sums": torch.randn(2, 1, c) if two else None,
        "weight": pack_weight(torch.randn(o, rows, 3, 3), shape, Tile(bn=16, bk=16), dtype), "bias": torch.randn(o),
        "border": torch.randn(9, o) if two else None, "gate_weight": pack_gate_weight(torch.randn(o, rows), dtype),
        "gate_bias": torch.randn(o), "scale": torch.randn(o) if identity else None,
        "shift": torch.randn(o) if identity else None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("identity", "two", "dtype"),
    [(True, False, torch.float32), (False, False, torch.float16), (False, True, torch.bfloat16)],
    ids=str,
)
def test_opcheck(identity, two, dtype):
    torch.library.opcheck(fused_conv, (), arguments(identity, two, dtype))


def test_opcheck_of_a_picture_with_split_k():
    shape = Geometry(6, 10, 3, 12, planar=True)
    args = arguments(identity=False) | {
        "a": torch.randn(2, 3, 6, 10), "a_sums": None, "bm": 16, "split_k": 2,
        "gate_weight": pack_gate_weight(torch.randn(12, 3), torch.float32),
        "weight": pack_weight(torch.randn(12, 3, 3, 3), shape, Tile(bn=16, bk=16), torch.float32),
    }  # fmt: skip
    y, sums = OP(**args)
    assert y.shape == (2, 6, 10, 16) and sums.shape == (2, 4, 16)
    torch.library.opcheck(fused_conv, (), args)


class Chain(nn.Module):
    """A picture through three fused convolutions, each reading the sums of the one before, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, cin in (("first", 3), ("second", 8), ("third", 8)):
            shape = Geometry(12, 10, cin, 8, planar=cin == 3)
            weight = pack_weight(torch.randn(8, cin, 3, 3) / (9 * cin) ** 0.5, shape, Tile(bn=16, bk=16), torch.float32)
            self.register_buffer(f"{name}_weight", weight)
            self.register_buffer(f"{name}_gate", torch.randn(cin, 8))
        self.register_buffer("row", torch.randn(8))
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        r, none = self.row, None
        y, s = OP(x, none, none, none, self.first_weight, r, none, self.first_gate, r, none, none, stride=2)
        z, t = OP(y, none, s, none, self.second_weight, r, none, self.second_gate, r, r, r)
        z, t = OP(z, none, t, none, self.third_weight, r, none, self.third_gate, r, none, none, activation="relu")
        return self.linear(t.sum(1) / (z.shape[1] * z.shape[2]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    model, x = Chain().eval(), torch.randn(2, 3, 12, 10)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_export():
    model, x = Chain().eval(), torch.randn(2, 3, 12, 10)
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    assert sum("fused_conv" in str(node.target) for node in exported.graph.nodes) == 3
    larger = torch.randn(5, 3, 12, 10)
    torch.testing.assert_close(exported.module()(larger), model(larger))


WRONG = {
    "layout": ({"a": torch.randn(2, 8, 7, 5).permute(0, 2, 3, 1)}, "a is not contiguous"),
    "type": ({"weight": torch.randn(1, 9, 16, 16, dtype=torch.float64)}, "weight is .* of torch.float64: expected"),
    "integers": ({"a": torch.zeros(2, 7, 5, 8, dtype=torch.int32)}, "a has type torch.int32: choose float32"),
    "shape": ({"gate_bias": torch.randn(9)}, r"gate_bias is \[9\] .* expected \[8\]"),
    "rank": ({"a": torch.randn(7, 5, 8)}, "expected four dimensions"),
    "device": (
        {"bias": torch.empty(8, device="meta")},
        "is on meta: the others are on|bias is on cpu|on cpu: the others are on meta",
    ),
    "groups": ({"groups": 3}, "must divide into 1 inputs x 3 groups"),
    "group of channels": ({"a_sums": torch.randn(2, 3, 7), "groups": 2}, "must divide into 1 inputs x 2 groups"),
    "shuffle": ({"shuffle": 3}, "must divide into 1 groups x 3 chunks"),
    "stride": ({"stride": 2}, "gate 'identity': needs one input"),
    "activation": ({"activation": "gelu"}, "choose of"),
    "tile": ({"bm": 60}, "powers of two from 16"),
    "missing": ({"shift": None}, "shift is missing"),
    "not wanted": ({"b_sums": torch.randn(2, 1, 8)}, "b_sums has no place"),
    "no picture": ({"a": torch.empty(0, 7, 5, 8), "a_sums": torch.empty(0, 1, 8)}, "holds no picture"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_arguments(wrong, message):
    with pytest.raises(ParNetError, match=message) as error:
        OP(**(arguments() | wrong))
    assert "\n" not in str(error.value)
