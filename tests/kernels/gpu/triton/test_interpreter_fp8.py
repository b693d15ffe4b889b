"""FP8 in Triton's interpreter: operations by their definition, in float64, and a network by the reference."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from cases import ALL, SEED
from parallel_parnet import Config, Engine, ParNetError, Placement, Program, create_model, fold, quantize
from parallel_parnet.executors.triton_backend import TritonBackend
from parallel_parnet.int8.agreement import agreement
from parallel_parnet.kernels.gpu.convolution import E4M3, Convolution
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile
from parallel_parnet.kernels.gpu.level import level
from parallel_parnet.kernels.gpu.packing import pack_weight
from parallel_parnet.kernels.gpu.samples import GATED, convolution, geometry
from parallel_parnet.program.arithmetic import pixel_affine

CASES = list(itertools.product(((1, 1), (7, 5)), (3, 20, 92), (Tile(64, 64, 64), Tile(16, 32, 128, split_k=2))))
NARROW = Config((8, 8, 16, 16), blocks=(1, 1, 1), num_classes=10, image_size=32)


def joined(parts: list[Tensor], groups: int) -> Tensor:
    """[N, C, ...] of each input to one, group by group."""
    return torch.cat([part.unflatten(1, (groups, -1)) for part in parts], 2).flatten(1, 2)


def made(shape: Geometry, tile: Tile, seed: int, stored: torch.dtype = E4M3) -> tuple[Convolution, Tensor]:
    """A random convolution over poisoned buffers, and the values that it should store, float64 [N, O, H, W]."""
    conv = convolution(shape, tile, 2, E4M3, seed, stored=stored)
    generator = torch.Generator().manual_seed(seed)
    weight = 64 * torch.randn(shape.cout, shape.cin // shape.groups, 3, 3, generator=generator) / shape.k**0.5
    weight = weight.to(torch.float16 if shape.planar else E4M3)
    x = conv.x._replace(weight=pack_weight(weight, shape, tile, weight.dtype))
    c, gate_weight = shape.cin // shape.inputs, x.gate_weight[:, : shape.cout].double().T
    if shape.planar:
        a, average = x.a.double(), x.a.double().mean((2, 3))
    else:
        a = joined([t[..., :c].double().movedim(3, 1) for t in (x.a, x.b) if t is not None], shape.groups)
        sums = [t[..., :c].double().sum(1) for t in (x.a_sums, x.b_sums) if t is not None]
        average = joined(sums, shape.groups) / (shape.h * shape.w)
    y = F.conv2d(a, weight.double(), None, shape.stride, 1, groups=shape.groups)
    column = lambda t: t.double()[:, None, None]  # noqa: E731
    y = y * (1 if x.weight_step is None else column(x.weight_step)) + column(x.bias)
    if x.border is not None:
        inside, border = torch.ones(1, 1, shape.h, shape.w).double(), x.border.double().T.reshape(-1, 1, 3, 3)
        y = y + F.conv2d(inside, border, None, shape.stride, 1)
    gate = F.conv2d(average[:, :, None, None], gate_weight[:, :, None, None], groups=shape.groups)
    gate = torch.sigmoid(gate + column(x.gate_bias))
    y = y + (column(x.scale) * a + column(x.shift)) * gate if shape.gate == "identity" else y * 2 * gate
    y = F.silu(y) if shape.activation == "silu" else F.relu(y)
    return Convolution(x, shape, tile), y.unflatten(1, (shape.groups, shape.shuffle, -1)).transpose(1, 2).flatten(1, 3)


def check(conv: Convolution, expected: Tensor) -> None:
    """Every number is the one that the value lies nearest to, and sums are of numbers times their steps."""
    y, channels, step = conv.x.y.double().movedim(3, 1), conv.shape.cout, conv.x.step.double()
    assert not y[:, channels:].any() and not conv.x.sums[..., channels:].any()
    y = y[:, :channels]
    value = (expected / step[:, None, None]).clamp(-448, 448)
    apart = 2.0 ** (torch.frexp(y.abs().clamp(min=2.0**-6))[1] - 4.0)
    assert ((y - value).abs() <= apart / 2 + 1e-5 * value.abs().max()).all()
    assert (y.abs() == 448).any() or value.abs().max() < 440
    sums = conv.x.sums[..., :channels].double().sum(1)
    torch.testing.assert_close(sums, (y * step[:, None, None]).sum((2, 3)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", GATED)
def test_operation(kind: str, seed: int) -> None:
    draw = random.Random(f"{SEED} {kind}")
    for size, channels, tile in CASES if ALL else draw.sample(CASES, 1):
        conv, expected = made(geometry(kind, *size, channels, draw.choice(["silu", "relu"])), tile, seed)
        level([conv])()
        check(conv, expected)


def test_what_a_classifier_reads_is_not_in_fp8(seed: int) -> None:
    conv, expected = made(geometry("down", 7, 5, 20), Tile(16, 32, 32), seed, torch.bfloat16)
    level([conv])()
    y = conv.x.y[..., : conv.shape.cout].double().movedim(3, 1)
    assert ((y - expected).abs() <= 2.0**-8 * expected.abs() + 1e-5 * expected.abs().max()).all()


def test_what_is_no_number_stays_none(seed: int) -> None:
    conv, _ = made(Geometry(9, 9, 16, 16, activation="relu"), Tile(16, 32, 32), seed)
    bits = conv.x.a.view(torch.uint8)
    bits[1, 4, 4, 3] = 127
    level([conv])()
    lost = conv.x.y.float().isnan()
    assert lost[1, 3:6, 3:6].all() and lost.sum() == 9 * 16


def test_conversions_are_those_of_a_gpu() -> None:
    """Each pattern of bits to its number and back; ties to even; what is too large to the largest."""
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = interpreter_builder.create_fp_to_fp(TensorHandle(bits.numpy(), tl.float8e4nv), tl.float32, None).data
    assert np.array_equal(numbers, bits.view(E4M3).float().numpy(), equal_nan=True)
    near = [numbers[:127] * factor for factor in (1, 1 + 2**-5, 1 - 2**-5)]
    near = np.concatenate([*near, (numbers[:126] + numbers[1:127]) / 2])
    given = np.concatenate([near, -near, [448.1, 1e30, np.inf, np.nan]]).astype(np.float32)
    found = interpreter_builder.create_fp_to_fp(TensorHandle(given, tl.float32), tl.float8e4nv, None).data
    expected = torch.from_numpy(given).clamp(-448, 448).to(E4M3).view(torch.uint8).numpy()
    assert np.array_equal(found[:-1], expected[:-1]) and found[-1] & 127 == 127


def test_shapes_that_do_not_fit(seed: int) -> None:
    conv, _ = made(geometry("plain", 3, 3, 20), Tile(16, 64, 32), seed)
    for changes, message in (
        ({"weight_step": None}, "weight_step is missing"),
        ({"step": conv.x.step[:-1]}, r"step is \[24\]"),
        ({"a": conv.x.a[..., :24].contiguous()}, r"a is \[2, 3, 3, 24\].*: expected \[2, 3, 3, 32\]"),
        ({"weight": conv.x.weight.transpose(2, 3).contiguous()}, r"weight is \[1, 9, 32, 64\]"),
        (
            {"weight": conv.x.weight.view(torch.uint8)},
            "weight is .* of torch.uint8: expected .*float8_e4m3fn",
        ),
    ):
        with pytest.raises(ParNetError, match=message):
            Convolution(conv.x._replace(**changes), conv.shape, conv.tile).check()


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(SEED)
    return quantize(fold(create_model(NARROW).eval()), torch.randn(8, 3, 32, 32), to=E4M3)


def test_network(program: Program, seed: int) -> None:
    """Operation by operation as the reference, and raw pictures on three lanes beside bf16."""
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    found = agreement(program, "triton", x)
    assert found.right, found
    raw = (60 * x + 120).clamp(0, 255).to(torch.uint8)
    placement = Placement.by_streams(program, 3)
    got = Engine(program, placement, "cpu", torch.bfloat16, "triton")(raw)
    scale, shift = pixel_affine(NARROW, raw.device)
    expected = Engine(program, device="cpu", executor="reference")(raw * scale + shift)
    assert ((got - expected).norm() / expected.norm()).item() < 0.25  # fp8 itself is 0.1 off, with so few channels


def test_a_lane_reads_the_answers_of_others() -> None:
    """It has no weights of theirs."""
    torch.manual_seed(SEED)
    exact = fold(create_model(NARROW).eval(), outputs=("streams.0", "streams.2", "fused"))
    program, nhw = quantize(exact, torch.randn(4, 3, 32, 32), to=E4M3), (1, 32, 32)
    segments = Placement.by_streams(program, 3).segments(program)
    devices, feature = [torch.device("cpu")] * 3, program.outputs["streams.2"]
    own = [segment for segment in segments if segment.lane == 0]
    assert not any(feature in segment.operations for segment in own)
    backend = TritonBackend(program, own, devices, torch.bfloat16)
    message = torch.randint(0, 120, backend.layout(feature, *nhw).shape, dtype=torch.uint8)
    n, c, h, w = program.shape(feature, *nhw)
    stored = message[: n * c * h * w].view(E4M3).view(n, h, w, c).float()
    found, step = backend.nchw(feature, message, nhw), program.weights[f"{feature}.step"]
    assert found.dtype == torch.bfloat16 and torch.equal(found.float(), (stored * step).movedim(3, 1))


def test_all_or_nothing(program: Program) -> None:
    """What is kept in fp32 would have to read fp8: torch does that."""
    exact = fold(create_model(NARROW).eval())
    kept = quantize(exact, torch.randn(2, 3, 32, 32), ["streams.1.0"], E4M3)
    with pytest.raises(ParNetError, match=r"^operation 'streams.1.0' is kept in fp32: [^\n]*executor eager$"):
        Engine(kept, device="cpu", executor="triton")(torch.randn(1, 3, 32, 32))
