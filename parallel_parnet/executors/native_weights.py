"""A convolution's weights as the CPU kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..kernels.cpu import native
from ..program.program import Operation
from .native_feature import Feature

# kept by output channel beside the kernel, and from which dimension on they are flat
ROWS = {"bias": 0, "gate_weight": 1, "gate_bias": 0, "scale": 0, "shift": 0, "weight_step": 0}


def pack(
    op: Operation,
    w: dict[str, Tensor],
    inputs: Sequence[Feature],
    panels: Sequence[native.Panel],
    dtype: torch.dtype,
    algorithm: int,
) -> dict[str, Tensor]:
    """Return the tensors that a convolution's `native.Op` points to, by the names of its fields.

    inputs: what it convolves. dtype: as which it reads them. algorithm: one of native.ALGORITHMS.
    """
    stored = partial(native.in_stored_order, groups=op.groups, shuffle=op.shuffle)
    weight, rows = stored(w["weight"]), {name: stored(w[name].flatten(at)) for name, at in ROWS.items() if name in w}
    if "border" in w:
        rows["bias"] = native.bias_by_edge(rows["bias"], stored(w["border"])[:, 0])
    if algorithm == native.DIRECT:
        packed = native.pack_direct(
            weight.to(torch.int8 if dtype == torch.uint8 else dtype), len(inputs), panels, inputs[0].pitch
        )
    else:
        packed = native.pack_winograd(weight, algorithm, dtype, panels)
    if dtype == torch.uint8:
        parts = weight.unflatten(1, (len(inputs), -1)).double().sum((2, 3, 4))
        at = torch.tensor([x.zero for x in inputs], dtype=torch.float64, device="cpu")
        rows["weight_zero"] = (parts @ at).to(torch.int32)
    return {"weight": packed, **{name: native.with_slack(tensor) for name, tensor in rows.items()}}
