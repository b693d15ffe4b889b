"""Quantised programs: what they must be, and what torch computes of them, against integers in numpy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuzz.generators import Forged
from parallel_parnet import Config, Engine, ParNetError, Placement, Program, fold, quantize
from parallel_parnet.executors.available import choose_executor, for_cpu
from parallel_parnet.int8.errors import errors
from parallel_parnet.parity import tolerance_quantised
from parallel_parnet.program.arithmetic import pixel_affine, quantised
from parallel_parnet.program.contract import E4M3, INPUT, MOST_SUMMED
from parallel_parnet.program.pixels import fold_pixels
from parallel_parnet.program.program import Operation
from program.test_fold import configs
from small import OPTIONAL, SMALL, lively, relative
from ungated import noise, random_placement

CPU = torch.device("cpu")
EXACT = fold(lively(SMALL, 5))
PROGRAMS = {to: quantize(EXACT, torch.randn(16, 3, 64, 64), to=to) for to in (torch.int8, E4M3)}
PROGRAM = PROGRAMS[torch.int8]
each_type = pytest.mark.parametrize("to", PROGRAMS, ids=str)


def changed(program: Program, changes: dict[str, Tensor | None], kind: type[Program] = Program) -> Program:
    """With other weights, by their names; None takes one away."""
    weights = {name: changes.get(name, tensor) for name, tensor in program.weights.items()} | changes
    return kind(program.config, program.operations, {name: t for name, t in weights.items() if t is not None})


OP = "streams.0.1"  # reads streams.0.0
WEIGHT, ZERO = PROGRAM.weights[f"{OP}.weight"], torch.tensor([7], dtype=torch.uint8)
BROKEN: list[tuple[dict[str, Tensor | None], str]] = [
    ({"streams.0.0.zero": None}, "features in uint8 have step and zero, those in e4m3 a step"),
    ({"streams.0.0.step": None}, "'streams.0.0': a feature in uint8 has step and zero"),
    ({"streams.0.0.step": None, "streams.0.0.zero": None}, "weight is int8, and 'streams.0.0', .* is not in uint8"),
    ({f"{OP}.weight_step": None}, f"'{OP}': a weight in int8 or e4m3 has a weight_step, and no other has one"),
    ({f"{OP}.weight": WEIGHT.float()}, "a weight in int8 or e4m3 has a weight_step, and no other has one"),
    ({"inits.0.0.weight_step": torch.ones(8)}, "'inits.0.0': a weight in int8 or e4m3 has a weight_step"),
    ({"inits.0.0.weight_step": torch.ones(8), "inits.0.0.weight": torch.ones(8, 3, 3, 3, dtype=torch.int8)},
     "'inits.0.0': its weight is int8, and 'input', which it reads, is not in uint8"),
    ({"head.fc.weight": torch.ones(10, 64, dtype=torch.int8)}, "'head.fc': a weight in int8 or e4m3 has a weight_step"),
    ({"head.fc.weight_step": torch.ones(10)}, "tensors belong to no operation, 'head.fc.weight_step' among them"),
    ({"head.fc.step": torch.ones(1), "head.fc.zero": ZERO}, "2 tensors belong to no operation"),
    ({"streams.0.0.step": torch.ones(2)}, r"step is \[2\] of torch.float32, .* expected \[1\] of float32"),
    ({"streams.0.0.step": torch.ones(1).double()}, "step is .* of torch.float64"),
    ({"streams.0.0.step": torch.zeros(1)}, "step holds 0.0 to 0.0: a feature's steps are 1.2e-38 to 6.6e"),
    ({"streams.0.0.step": -torch.ones(1)}, "step holds -1.0 to -1.0: a feature's steps are"),
    ({"streams.0.0.step": torch.full((1,), 1e-39)}, "step holds 1.0.*e-39 to 1.0.*: a feature's steps are"),
    ({"streams.0.0.step": torch.full((1,), 1e37)}, "step holds 9.9.*e.36 to 9.9.*: a feature's steps are"),
    ({"streams.0.0.step": torch.full((1,), torch.nan)}, "step holds non-finite"),
    ({"streams.0.0.zero": torch.zeros(1)}, r"zero is \[1\] of torch.float32, .* expected \[1\] of uint8"),
    ({"streams.0.0.zero": torch.zeros(1, dtype=torch.int8)}, "zero is .* expected .* of uint8"),
    ({"streams.0.0.zero": torch.zeros(8, dtype=torch.uint8)}, r"zero is \[8\]"),
    ({f"{OP}.weight": WEIGHT.int()}, "a weight in int8 or e4m3 has a weight_step"),
    ({f"{OP}.weight": torch.full_like(WEIGHT, -128)}, "weight holds -128: int8 weights are -127 to 127"),
    ({f"{OP}.weight": WEIGHT[:4]}, r"weight is \[4, 8, 3, 3\] of torch.int8"),
    ({f"{OP}.weight_step": torch.ones(1)}, r"weight_step is \[1\]"),
    ({f"{OP}.weight_step": torch.zeros(8)}, "weight_step holds 0.0: steps are positive"),
    ({f"{OP}.weight_step": torch.full((8,), torch.inf)}, "weight_step holds non-finite"),
    ({f"{OP}.bias": torch.zeros(8, dtype=torch.int8)}, "bias is .* expected .* of float32"),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_what_a_quantised_program_must_be(weights: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    """In Python and from a file alike."""
    with pytest.raises(ParNetError, match=message):
        changed(PROGRAM, weights)
    forged, path = changed(PROGRAM, weights, Forged), tmp_path / "p.safetensors"
    assert isinstance(forged, Forged)
    path.write_bytes(forged.content({}))
    with pytest.raises(ParNetError, match=rf"^\S*p\.safetensors: [^\n]*{message}"):
        Program.load(path)


def test_what_it_may_be() -> None:
    """An fp32 convolution reads integers, a feature of the last level has a step, zero is at either end."""
    assert PROGRAM.quantised and not EXACT.quantised
    fp32 = {f"{OP}.weight_step": None, f"{OP}.weight": EXACT.weights[f"{OP}.weight"]}
    for weights in (fp32, {"combine.3.step": torch.ones(1), "combine.3.zero": ZERO * 0}):
        assert changed(PROGRAM, weights).quantised
    assert changed(EXACT, {"combine.3.step": torch.ones(1), "combine.3.zero": ZERO * 0 + 255}).quantised


def widest(cin: int) -> Program:
    """A convolution of so many channels, all of whose products are as large as 8 bits allow."""
    ops = (
        Operation("stem", "conv", "stem", None, 1, (INPUT,), 3, cin, stride=2, gate="plain", activation="relu"),
        Operation("wide", "conv", "stream", 0, 2, ("stem",), cin, 8, gate="plain", activation="relu"),
        Operation("head.fc", "classifier", "head", None, 3, ("wide",), 8, 10),
    )
    weights = {
        "stem.weight": torch.zeros(cin, 3, 3, 3), "stem.bias": torch.full((cin,), 300.0),
        "stem.step": torch.ones(1), "stem.zero": torch.zeros(1, dtype=torch.uint8),
        "wide.weight": torch.full((8, cin, 3, 3), 127, dtype=torch.int8), "wide.weight_step": torch.full((8,), 1e-6),
        "wide.bias": torch.zeros(8), "head.fc.weight": torch.eye(10, 8), "head.fc.bias": torch.zeros(10),
    }  # fmt: skip
    for op in ops[:2]:
        weights |= {
            f"{op.name}.gate_weight": torch.zeros(op.cout, op.cin),
            f"{op.name}.gate_bias": torch.zeros(op.cout),
        }
    return Program(Config((cin, 8), blocks=(1,), num_classes=10), ops, weights)


@pytest.mark.parametrize("executor", ["reference", *({"native"} & set(OPTIONAL))])
def test_sums_of_32_bits(executor: str) -> None:
    """The most channels that a convolution may have fill them, and one more is refused."""
    got = Engine(widest(MOST_SUMMED), device="cpu", executor=executor)(torch.zeros(1, 3, 32, 32))
    of_pixels = 255 * 127 * MOST_SUMMED * np.outer([6, *[9] * 14, 6], [2 / 3, *[1] * 14, 2 / 3])
    off = relative(got[:, :8], torch.full((1, 8), float(1e-6 * of_pixels.mean())))
    assert off < (1e-4 if executor == "reference" else 1e-5)  # one adds in fp32; a channel less is off by 1.4e-4
    with pytest.raises(ParNetError, match="'wide': 7368 channels are too many for sums of 32 bits, at most 7367"):
        widest(MOST_SUMMED + 1)


@each_type
def test_files_and_digests(to: torch.dtype, tmp_path: Path) -> None:
    path, program = tmp_path / "p.safetensors", PROGRAMS[to]
    program.save(path)
    loaded, x = Program.load(path), torch.randn(2, 3, 64, 32)
    assert loaded.digest == program.digest != EXACT.digest and loaded.quantised == to
    assert {name: t.dtype for name, t in loaded.weights.items()} == {n: t.dtype for n, t in program.weights.items()}
    expected = Engine(program, device="cpu", executor="eager")(x)
    assert torch.equal(Engine(loaded, device="cpu", executor="eager")(x), expected)
    Engine(program, device="cpu", executor="eager").save(path)
    assert torch.equal(Engine.load(path, "cpu")(x), expected)
    for name in {f"{OP}.weight", f"{OP}.weight_step", "streams.0.0.step", "streams.0.0.zero"} & program.weights.keys():
        other = program.weights[name].float()
        other.view(-1)[0] = 2 if other.view(-1)[0] == 1 else 1
        assert changed(program, {name: other.to(program.weights[name].dtype)}).digest != program.digest
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ParNetError, match="damaged"):
        Program.load(path)


def test_bytes_of_an_int8_operation() -> None:
    row = next(row for row in PROGRAM.cost(64, batch=2).operations if row.name == OP)
    pixels, width = 16 * 16, 8
    weights = width * width * 9 + 4 * (width * width + 5 * width) + 4 + 1  # bias, gate bias, scale, shift, steps; zero
    assert row.bytes == 2 * 2 * pixels * width + weights
    assert row.flops == next(row for row in EXACT.cost(64, batch=2).operations if row.name == OP).flops


def conv(x: np.ndarray, weight: np.ndarray, stride: int, groups: int) -> np.ndarray:
    """3x3, padding 1, in the type of its arguments, tap by tap."""
    n, _, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    cout, k = weight.shape[:2]
    y = np.zeros((n, cout, h // stride, w // stride), x.dtype)
    for g in range(groups):
        rows, columns = slice(g * cout // groups, (g + 1) * cout // groups), slice(g * k, (g + 1) * k)
        for i in range(3):
            for j in range(3):
                taken = padded[:, columns, i : i + h : stride, j : j + w : stride]
                y[:, rows] += np.einsum("ok,nkhw->nohw", weight[rows, :, i, j], taken)
    return y


def sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(x / 2)) / 2


def expected_of(program: Program, op: Operation, inputs: list[np.ndarray]) -> np.ndarray:
    """What leaves the activation, and the shuffle, in float64: integers multiplied as int64, and fp8's numbers as they
    are stored. inputs: as readers see them."""
    w = {name: tensor.double().numpy() for name, tensor in program.weights_of(op).items()}
    groups = op.groups

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        cut = [np.split(part, groups, 1) for part in parts]
        return np.concatenate([piece for pieces in zip(*cut, strict=True) for piece in pieces], 1)

    x = joined(inputs)
    if "weight_step" in w:
        steps = [program.weights[f"{name}.step"].double().numpy()[:, None, None] for name in op.inputs]
        stored = joined([values / step for values, step in zip(inputs, steps, strict=True)])
        if program.quantised == torch.int8:
            stored, w["weight"] = np.rint(stored).astype(np.int64), w["weight"].astype(np.int64)
        y = w["weight_step"][:, None, None] * conv(stored, w["weight"], op.stride, groups)
    else:
        y = conv(x, w["weight"], op.stride, groups)
    y = y + w["bias"][:, None, None]
    if "border" in w:
        y = y + conv(np.ones_like(x[:1, :1]), w["border"][:, None], op.stride, 1)
    average, k = x.mean((2, 3)), w["gate_weight"].shape[1]
    rows = np.arange(op.cout) // (op.cout // groups)
    own = np.stack([average[:, g * k : (g + 1) * k] for g in rows], 1)
    gate = sigmoid((own * w["gate_weight"]).sum(2) + w["gate_bias"])[:, :, None, None]
    if op.gate == "identity":
        y = y + (w["scale"][:, None, None] * x + w["shift"][:, None, None]) * gate
    else:
        y = y * 2 * gate
    y = y * sigmoid(y) if op.activation == "silu" else np.maximum(y, 0)
    n, c, h, width = y.shape
    return y.reshape(n, groups, op.shuffle, -1, h, width).swapaxes(1, 2).reshape(n, c, h, width)


def any_program(config: Config, rng: Random, to: torch.dtype) -> Program:
    """Some of it kept in fp32; in int8 with ranges that clip, zeros anywhere, and kernels of extremes."""
    exact = fold(lively(config, rng.randrange(100)))
    names = [op.name for op in exact.operations if op.kind == "conv" and INPUT not in op.inputs]
    keep = rng.sample(names, rng.randrange(len(names)))
    m = exact.size_multiple
    program = quantize(exact, torch.randn(2, 3, m, m), keep, to)
    weights = dict(program.weights)
    for name, tensor in weights.items():
        if name.endswith(".zero") and rng.random() < 0.5:
            weights[name] = torch.tensor([rng.choice((0, 1, 128, 254, 255))], dtype=torch.uint8)
        elif tensor.dtype == torch.int8 and rng.random() < 0.5:
            weights[name] = torch.where(torch.rand(tensor.shape) < 0.5, torch.tensor(-127, dtype=torch.int8), tensor)
    return Program(program.config, program.operations, weights)


def rounded(values: np.ndarray) -> np.ndarray:
    """To the nearest number of 3 bits of fraction, 2^-9 or more apart, half to even, and 448 at most."""
    _, exponent = np.frexp(values)
    apart = 2.0 ** (np.maximum(exponent - 1, -6) - 3)
    return np.clip(np.rint(values / apart) * apart, -448, 448)


def assert_nearest_int8(got: np.ndarray, value: np.ndarray, weights: dict[str, np.ndarray]) -> None:
    step, zero = weights["step"].item(), weights["zero"].item()
    integers = got / step + zero
    assert np.abs(integers - integers.round()).max() < 1e-4 and integers.min() > -0.5 and integers.max() < 255.5
    away = np.abs(integers.round() - np.clip(value / step + zero, 0, 255))
    # fp32 rounds parts of a sum that may be larger than what the range holds
    assert away.max() < 0.5 + 1e-5 * max(1.0, np.abs(value / step).max())


def assert_nearest_e4m3(got: np.ndarray, value: np.ndarray, weights: dict[str, np.ndarray]) -> None:
    step = weights["step"][:, None, None]
    stored = got / step
    assert (stored == rounded(stored)).all() and np.abs(stored).max() <= 448
    away = np.abs(stored - np.clip(value / step, -448, 448))
    _, exponent = np.frexp(np.maximum(np.abs(stored), 2.0**-6))
    # half of the way to the next number, of the larger ones' at the edge; and what fp32 makes of a larger sum
    assert (away <= 2.0 ** (exponent - 5) + 1e-5 * max(1.0, np.abs(value / step).max())).all()


@each_type
@settings(max_examples=25, deadline=None)
@given(
    config=configs(), rng=st.randoms(use_true_random=True), executor=st.sampled_from(("reference", "eager")),
    scale=st.sampled_from((1.0, 30.0)),
)  # fmt: skip
def test_every_operation_of_any_program(
    to: torch.dtype, config: Config, rng: Random, executor: str, scale: float
) -> None:
    """From the inputs that it had, each quantised value is the one that numpy's lies nearest to."""
    program = any_program(config, rng, to)
    whole = replace(program, outputs={op.name: op.name for op in program.operations})
    m = program.size_multiple
    x = scale * torch.randn(2, 3, m, 2 * m)
    features = Engine(whole, device="cpu", executor=executor)(x)
    assert isinstance(features, dict)
    features[INPUT] = x
    for op in (op for op in program.operations if op.kind == "conv"):
        got = features[op.name].double().numpy()
        inputs = [features[name].double().numpy() for name in op.inputs]
        value = expected_of(program, op, inputs)
        weights = {name: tensor.double().numpy() for name, tensor in program.weights_of(op).items()}
        if "step" in weights:
            (assert_nearest_int8 if to == torch.int8 else assert_nearest_e4m3)(got, value, weights)
        else:  # sums that cancel, or are far below zero, keep what fp32 rounded off their parts
            floor = 1e-8 * np.linalg.norm(inputs)
            assert np.linalg.norm(got - value) <= 1e-5 * np.linalg.norm(value) + floor


def test_rounding() -> None:
    """Half to even, clipped at both ends, and the same again."""
    step, zero = torch.tensor([0.5]), torch.tensor([3.0])
    values = torch.tensor([-9.0, -1.5, -0.75, -0.25, 0.0, 0.25, 0.75, 1.25, 125.9, 126.0, 1e30, -torch.inf, torch.inf])
    found = quantised(values, step, zero)
    assert found.tolist() == [-1.5, -1.5, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 126.0, 126.0, 126.0, -1.5, 126.0]
    assert torch.equal(quantised(found, step, zero), found)
    assert quantised(torch.tensor([torch.nan]), step, zero).isnan().all(), "a sensor that fails is not hidden"


@settings(max_examples=200, deadline=None)
@given(mantissa=st.integers(1 << 23, (1 << 24) - 1), exponent=st.integers(-149, 95), zero=st.integers(0, 255))
def test_values_that_cross_lanes_stand_for_the_same_integers(mantissa: int, exponent: int, zero: int) -> None:
    """Of any step: the reader divides what was multiplied, and quantising again changes no bit."""
    step = torch.tensor([float(mantissa) * 2.0**exponent])
    integers = torch.arange(256) - zero
    values = step * integers
    assert torch.equal(torch.round(values * (1 / step)), integers.float())
    assert torch.equal(quantised(values, step, torch.tensor([float(zero)])), values)


@settings(max_examples=8, deadline=None)
@given(st.data(), st.integers(2, 3))
def test_any_placement(data: st.DataObject, lanes: int) -> None:
    placement, x = random_placement(PROGRAM, lanes, data.draw), noise(data.draw, 2, 3, 64, 32)
    expected = Engine(PROGRAM, device="cpu", executor="reference")(x)
    assert torch.equal(Engine(PROGRAM, placement, "cpu", executor="reference")(x), expected)


@each_type
def test_raw_pictures(to: torch.dtype) -> None:
    program, x = PROGRAMS[to], torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    scale, shift = pixel_affine(program.config, x.device)
    plain = x * scale + shift
    limit = tolerance_quantised(errors({"": program}, EXACT, plain)[""])
    for executor in ("reference", "eager"):
        engine = Engine(program, device="cpu", executor=executor)
        assert relative(engine(x), engine(plain)) < limit
    folded = fold_pixels(program, torch.float32)
    assert {name: t.dtype for name, t in folded.weights.items() if "inits.0.0" not in name} == {
        name: t.dtype for name, t in program.weights.items() if "inits.0.0" not in name
    }
    for name in {"inits.0.0.step", "inits.0.0.zero"} & program.weights.keys():
        assert torch.equal(folded.weights[name], program.weights[name])


@pytest.mark.long
def test_inductor_computes_the_same() -> None:
    exact = fold(lively(Config((4, 8), blocks=(1,), num_classes=3), 1))
    program, x = quantize(exact, torch.randn(4, 3, 32, 32)), torch.randn(2, 3, 32, 32)
    expected = Engine(program, device="cpu", executor="reference")(x)
    got = Engine(program, device="cpu", executor="inductor")(x)
    assert relative(got, expected) < tolerance_quantised(errors({"": program}, exact, x)[""])


@each_type
def test_torch_export_computes_the_same(to: torch.dtype) -> None:
    program, x = PROGRAMS[to], torch.randn(3, 3, 64, 96)
    limit = 1e-5 if to == torch.int8 else tolerance_quantised(errors({"": program}, EXACT, x)[""])
    found = program.to_exported_program().module()(x)
    assert relative(found, Engine(program, device="cpu", executor="reference")(x)) < limit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"executor": "openvino"},
            "executor openvino runs no program quantised to int8: choose native, inductor, eager",
        ),
        ({"executor": "eager", "dtype": torch.bfloat16}, "bfloat16 for a quantised program, .* leave it at float32"),
        ({"dtype": torch.int8}, "dtype torch.int8: choose torch.float32"),
    ],
)
def test_what_an_engine_refuses(options: dict, message: str) -> None:
    with pytest.raises(ParNetError, match=message):
        Engine(PROGRAM, device="cpu", **options)
    with pytest.raises(ParNetError, match="has no ONNX file here: export the fp32 program"):
        PROGRAM.to_onnx()


def test_who_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """For "auto" the CPU kernels, else torch; never what knows nothing of int8, on a GPU either."""
    monkeypatch.setattr("parallel_parnet.executors.available.lacking", lambda backend: None)
    chosen = partial(choose_executor, dtype=torch.float32, quantised=torch.int8)
    assert for_cpu(torch.float32, torch.int8) == ["native"] and chosen("auto", CPU) == "native"
    gpu = torch.device("cuda")
    assert chosen("auto", gpu) == "eager"
    for executor in ("triton", "cuda_graph"):
        with pytest.raises(ParNetError, match=f"executor {executor} runs no program quantised to int8"):
            chosen(executor, gpu)
    monkeypatch.setattr("parallel_parnet.executors.available.lacking", lambda backend: backend != "eager")
    assert chosen("auto", CPU) == "eager"
    assert Engine(PROGRAM, Placement.single(PROGRAM), "cpu", executor="eager").arithmetic == torch.int8
