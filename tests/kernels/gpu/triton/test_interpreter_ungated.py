"""Operations that no ParNet has, in Triton's interpreter, against plain torch: the twins are not asked here."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_interpreter import ROUNDING, assert_matches_twin
from torch import Tensor

from parallel_parnet import Engine, Program
from parallel_parnet.executors.triton_backend import whole
from parallel_parnet.kernels.gpu.convolution import Convolution
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile
from parallel_parnet.kernels.gpu.level import level
from parallel_parnet.kernels.gpu.maxpool import maxpool
from parallel_parnet.kernels.gpu.packing import pack_weight
from parallel_parnet.kernels.gpu.samples import convolution
from parallel_parnet.program.rivals import repvgg, resnet
from ungated import noise, random_program

CPU = torch.device("cpu")
ACT = {"silu": F.silu, "relu": F.relu, "none": lambda x: x}
TILES = (Tile(16, 32, 32), Tile(64, 16, 64), Tile(16, 64, 16, split_k=3))


def made(draw: random.Random, kernel: int, groups: int, planar: bool, residual: bool) -> tuple[Convolution, Tensor]:
    """A random convolution over poisoned buffers, and what it should make, fp64 [N, O, H, W]."""
    dtype, inputs = draw.choice(list(ROUNDING)), 1 if planar else draw.randint(1, 2)
    shape = Geometry(
        draw.randint(1, 9), draw.randint(1, 9), 3 if planar else inputs * groups * draw.randint(1, 20),
        groups * draw.randint(1, 20), draw.randint(1, 2), groups, 1, "none", draw.choice(list(ACT)), inputs, planar,
        kernel, residual, draw.random() < 0.5,
    )  # fmt: skip
    tile, seed = draw.choice(TILES), draw.randrange(2**31)
    conv = convolution(shape, tile, 2, dtype, seed, border=False)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape.cout, shape.cin // groups, kernel, kernel, generator=generator) / shape.k**0.5
    conv = Convolution(conv.x._replace(weight=pack_weight(weight, shape, tile, dtype)), shape, tile)
    width = shape.cin // inputs
    given = [conv.x.a] if planar else [t[..., :width].movedim(3, 1) for t in (conv.x.a, conv.x.b) if t is not None]
    x = torch.cat([t.double().unflatten(1, (groups, -1)) for t in given], 2).flatten(1, 2)
    y = F.conv2d(x, weight.to(dtype).double(), conv.x.bias.double(), shape.stride, kernel // 2, groups=groups)
    if conv.x.residual is not None:
        y += conv.x.residual[..., : shape.cout].movedim(3, 1)
    return conv, ACT[shape.activation](y)


@pytest.mark.parametrize(
    ("kernel", "groups", "planar"),
    [
        (1, 1, False),
        (1, 4, False),
        (3, 1, False),
        (3, 2, False),
        (3, 4, False),
        (1, 1, True),
        (3, 1, True),
        (7, 1, True),
    ],
)
def test_operation(kernel: int, groups: int, planar: bool, seed: int) -> None:
    draw = random.Random(seed)
    for residual in (False, False) if planar else (False, True):
        conv, expected = made(draw, kernel, groups, planar, residual)
        level([conv])()
        y = conv.x.y.double().movedim(3, 1)
        assert not y[:, conv.shape.cout :].any(), "the places behind the last channel are not zero"
        error = (y[:, : conv.shape.cout] - expected).abs()
        assert (error <= 1.01 * ROUNDING[conv.dtype] * expected.abs() + 1e-5 * expected.abs().max() + 1e-7).all()
        assert conv.x.sums is None or torch.allclose(conv.x.sums.double().sum(1), y.sum((2, 3)), rtol=1e-5, atol=1e-4)


def test_a_level_with_and_without_gates(seed: int) -> None:
    """Tiles alone are shared: neither kernel, nor gate, nor activation, nor whether sums are made."""
    shapes = [
        Geometry(7, 5, 20, 20, gate="identity"),
        Geometry(9, 6, 12, 24, 2, gate="none", activation="none", kernel=1, sums=False),
        Geometry(7, 5, 24, 16, groups=4, gate="none", activation="relu", residual=True),
    ]
    operations = [convolution(shape, Tile(16, 32, 32), 2, torch.float16, seed + i) for i, shape in enumerate(shapes)]
    level(operations)()
    for conv in operations:
        assert_matches_twin(conv)


def test_a_gate_on_the_identity_of_a_raw_picture(seed: int) -> None:
    conv = convolution(Geometry(7, 5, 3, 3, gate="identity", planar=True), Tile(16, 16, 32), 2, torch.float32, seed)
    conv = Convolution(conv.x._replace(a=conv.x.a.mul(60).clamp(0, 255).to(torch.uint8)), conv.shape, conv.tile)
    level([conv])()
    assert_matches_twin(conv)


@pytest.mark.parametrize(("stride", "sums"), [(1, False), (2, True)])
def test_maxpool(stride: int, sums: bool, seed: int) -> None:
    """All values below zero, so that nothing from outside may win, and a NaN."""
    shape = Geometry(9, 7, 68, 68, stride, gate="none", activation="none", sums=sums)
    x = F.pad(-torch.rand(2, 9, 7, 68, generator=torch.Generator().manual_seed(seed)), (0, 4)).half()
    x[1, 4, 4, 5] = float("nan")
    y = torch.empty(2, shape.hout, shape.wout, 72, dtype=torch.float16)
    made = torch.empty(2, Tile(16, 64).spatial(shape), 72) if sums else None
    maxpool(x, y, made, shape)()
    expected = F.max_pool2d(x.movedim(3, 1), 3, stride, padding=1).movedim(1, 3)
    assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7)) and y.isnan().any()
    if made is not None:
        torch.testing.assert_close(made.sum(1), expected.float().sum((1, 2)), equal_nan=True)


def plain(program: Program, x: Tensor) -> Tensor:
    """The logits, fp64, by torch's functions alone."""
    features = {"input": x.double()}
    for op in program.operations:
        w = {name: tensor.double() for name, tensor in program.weights_of(op).items()}
        a, *more = (features[name] for name in op.inputs)
        if op.kind == "maxpool":
            y = F.max_pool2d(a, 3, op.stride, padding=1)
        elif op.kind == "classifier":
            y = F.linear(a.mean((2, 3)), w["weight"], w["bias"])
        else:
            y = F.conv2d(a, w["weight"], w["bias"], op.stride, op.kernel // 2, groups=op.groups)
            y = ACT[op.activation](y + more[0] if op.residual else y)
        features[op.name] = y
    return features[program.output]


NETWORKS = {
    "resnet": resnet((1, 1), bottleneck=False, width=8, classes=10),
    "bottleneck": resnet((1, 1), bottleneck=True, width=8, classes=10),
    "repvgg": repvgg((1, 2), (12, 32), groups=4, classes=10),
}


@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [("resnet", torch.float16, 1e-2), ("bottleneck", torch.float32, 1e-5), ("repvgg", torch.bfloat16, 5e-2)],
    ids=str,
)
def test_network(name: str, dtype: torch.dtype, limit: float, seed: int) -> None:
    """Narrow ones, of 40 x 56 pixels, which is as odd as features get."""
    program = NETWORKS[name]
    x = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(seed)).to(dtype)
    segment = whole(program, (1, 40, 56), dtype, CPU)
    segment.reads[0].copy_(x)
    expected = plain(program, x)
    (logits,) = segment()
    assert ((logits - expected).norm() / expected.norm()).item() < limit
    summed = [name for name, feature in segment._features.items() if feature.sums is not None]
    assert summed == [program.operations[-1].inputs[0]], "sums are made for who reads them"
    assert len(segment.launches) == program.launches
    assert segment.launches[0].arguments[2] == 0, "nobody leads where nobody waits"


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_programs(data: st.DataObject) -> None:
    """Gates beside none, maxima whose sums a gate reads, two inputs and a residual; normalised and raw."""
    program = random_program(data.draw, operations=4, widths=(1, 12))
    x = noise(data.draw, 1, 3, program.size_multiple, program.size_multiple)
    raw = (x * 60 + 120).clamp(0, 255).to(torch.uint8)
    batch = data.draw(st.sampled_from((x, raw)))
    got = Engine(program, device="cpu", executor="triton")(batch)
    expected = Engine(program, device="cpu", executor="reference")(batch)
    got, expected = (a if isinstance(a, dict) else {"logits": a} for a in (got, expected))
    for feature, values in expected.items():
        assert (got[feature] - values).norm() <= 3e-5 * values.norm(), feature
