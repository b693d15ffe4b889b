"""Raw pictures, uint8 0..255: normalised by the first convolution's own weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..settings import with_own_settings
from .arithmetic import normalisation
from .program import INPUT, Program


@with_own_settings
def fold_pixels(program: Program, dtype: torch.dtype) -> Program:
    """Make the program that gives for uint8 pictures what `program` gives for them normalised.

    Padding is black for the kernel, and average for the network: so the shift counts only the taps inside the picture,
    as `border` does. The shift is that of the weights as rounded to `dtype`: rounding them then does no more harm than
    it does to normalised pictures, though raw values are far from zero.
    """
    weights = dict(program.weights)
    scale, shift = normalisation(program.config, next(iter(weights.values())).device)
    for op in program.operations:
        if INPUT not in op.inputs:
            continue
        w = {name: tensor.double() for name, tensor in program.weights_of(op).items() if name not in ("step", "zero")}
        for name in w.keys() & {"weight", "gate_weight"}:
            w[name] = (w[name] * _along(scale, w[name])).to(dtype).double()
        offset = shift / scale
        w["border"] = w.get("border", 0) + (w["weight"] * _along(offset, w["weight"])).sum(1)
        if op.gate != "none":
            w["gate_bias"] = w["gate_bias"] + (w["gate_weight"] * _along(offset, w["gate_weight"])).sum(1)
        if op.gate == "identity":
            w["shift"] = w["shift"] + w["scale"] * shift
            w["scale"] = w["scale"] * scale
        weights |= {f"{op.name}.{name}": tensor.float().contiguous() for name, tensor in w.items()}
    return replace(program, weights=weights, original=program)


def _along(channels: Tensor, weight: Tensor) -> Tensor:
    """A value for each input channel, shaped to multiply a weight [cout, cin, ...]."""
    return channels.view(1, -1, *[1] * (weight.ndim - 2))
