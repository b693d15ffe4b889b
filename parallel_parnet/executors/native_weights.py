"""A convolution's weights as the CPU kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.cpu import native
from ..program.program import Operation


def pack(
    op: Operation,
    w: dict[str, Tensor],
    zeros: Sequence[int],
    panels: Sequence[native.Panel],
    dtype: torch.dtype,
    algorithm: int,
) -> dict[str, Tensor]:
    """Return the tensors that a convolution's `native.Op` points to, by the names of its fields.

    zeros: what stands for 0 in each input. dtype: of the features that it reads. algorithm: one of native.ALGORITHMS.
    """
    rows = {
        name: native.in_stored_order(tensor.flatten(1) if name == "gate_weight" else tensor, op.groups, op.shuffle)
        for name, tensor in w.items()
        if name in ("weight", "bias", "border", "gate_weight", "gate_bias")
    }
    weight, border = rows.pop("weight"), rows.pop("border", None)
    if border is not None:
        rows["bias"] = native.bias_by_edge(rows["bias"], border[:, 0])
    rows |= {name: w[name].flatten() for name in ("scale", "shift") if name in w}
    if "weight_step" in w:
        rows["weight_step"] = native.in_stored_order(w["weight_step"].flatten(), op.groups, op.shuffle)
    if algorithm == native.DIRECT:
        packed = native.pack_direct(weight.to(torch.int8 if dtype == torch.uint8 else dtype), len(zeros), panels)
    else:
        packed = native.pack_winograd(weight, algorithm, dtype, panels)
    if dtype == torch.uint8:
        parts = weight.unflatten(1, (len(zeros), -1)).double().sum((2, 3, 4))
        at = torch.tensor(zeros, dtype=torch.float64, device="cpu")
        rows["weight_zero"] = (parts @ at).to(torch.int32)
    return {"weight": packed, **{name: native.with_slack(tensor) for name, tensor in rows.items()}}
