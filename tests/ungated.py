"""Random programs of all kinds of operations, those that no ParNet has among them; placements, and pictures."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from parallel_parnet import Config, Placement, Program
from parallel_parnet.program.contract import INPUT, shapes
from parallel_parnet.program.program import Operation


def random_program(draw: st.DrawFn, operations: int = 6, widths: tuple[int, int] = (1, 40)) -> Program:
    """A convolution of the picture, so many operations on whatever is there, and a classifier of the last one; two
    features besides are outputs. Features of 32 picture pixels to a side at most have sizes that no vector divides."""
    made = [_first(draw, "stem", widths)]
    scale, level, made_by = {"stem": made[0].stride}, {"stem": 1}, {"stem": made[0]}
    for i in range(draw(st.integers(1, operations))):
        op = _next(draw, f"op{i}", list(made_by.values()), scale, level, widths)
        made.append(op)
        scale[op.name], level[op.name], made_by[op.name] = op.stride * scale[op.inputs[0]], op.level, op
    last = made[-1]
    made.append(Operation("fc", "classifier", "head", None, last.level + 1, (last.name,), last.cout, 10))
    outputs = {"logits": "fc", "middle": draw(st.sampled_from(made[:-1])).name} if draw(st.booleans()) else {}
    config = Config((8, 8), blocks=(1,), num_classes=10, image_size=64)
    return Program(config, tuple(made), weights_of(made, draw(st.integers(0, 99))), outputs)


def noise(draw: st.DrawFn, *shape: int) -> torch.Tensor:
    """As torch draws it, from a seed that hypothesis can repeat."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))


def random_placement(program: Program, lanes: int, draw: st.DrawFn) -> Placement:
    """Any operation on any lanes, whichever they are."""
    subsets = st.sets(st.integers(0, lanes - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    where = {op.name: draw(subsets) for op in program.operations}
    return Placement(lanes, where, coordinator=draw(st.integers(0, lanes - 1)))


def weights_of(operations: list[Operation], seed: int) -> dict[str, torch.Tensor]:
    """Random, such that features neither vanish nor grow."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for op in operations:
        for name, shape in shapes(op).items():
            fan = shape[1] * op.kernel**2 if name == "weight" and op.kind == "conv" else shape[-1]
            weights[f"{op.name}.{name}"] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
    return weights


def _first(draw: st.DrawFn, name: str, widths: tuple[int, int]) -> Operation:
    gate = draw(st.sampled_from(("none", "none", "plain")))
    kernel = draw(st.sampled_from((1, 3, 7))) if gate == "none" else 3
    return Operation(
        name, "conv", "stem", None, 1, (INPUT,), 3, draw(st.integers(*widths)), draw(st.sampled_from((1, 2))),
        gate=gate, activation=_activation(draw, gate), kernel=kernel,
    )  # fmt: skip


def _activation(draw: st.DrawFn, gate: str) -> str:
    return draw(st.sampled_from(("silu", "relu", *(("none",) if gate == "none" else ()))))


def _next(
    draw: st.DrawFn, name: str, made: list[Operation], scale: dict[str, int], level: dict[str, int],
    widths: tuple[int, int],
) -> Operation:  # fmt: skip
    x = draw(st.sampled_from(made[-3:]))
    stride = draw(st.sampled_from((1, 1, 2))) if scale[x.name] < 32 else 1
    if draw(st.integers(0, 4)) == 0:
        return Operation(name, "maxpool", "stream", 0, x.level + 1, (x.name,), x.cout, x.cout, stride)
    alike = [op for op in made if (op.cout, scale[op.name]) == (x.cout, scale[x.name])]
    inputs = (x.name, draw(st.sampled_from(alike)).name) if draw(st.integers(0, 3)) == 0 else (x.name,)
    cin = x.cout * len(inputs)
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 8) if x.cout % g == 0]))
    gate = draw(st.sampled_from(("none", "none", "none", "plain")))
    added = [op for op in made if scale[op.name] == stride * scale[x.name]]
    residual = draw(st.sampled_from(added)) if gate == "none" and added and draw(st.booleans()) else None
    if residual is not None and residual.cout % groups:
        residual = None
    cout = groups * draw(st.integers(1, max(1, widths[1] // groups))) if residual is None else residual.cout
    inputs += () if residual is None else (residual.name,)
    return Operation(
        name, "conv", "stream", 0, 1 + max(level[i] for i in inputs), inputs, cin, cout, stride, groups,
        gate=gate, activation=_activation(draw, gate), kernel=draw(st.sampled_from((1, 3))) if gate == "none" else 3,
        residual=residual is not None,
    )  # fmt: skip
