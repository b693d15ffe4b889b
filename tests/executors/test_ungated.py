"""Operations that no ParNet has: random programs of them against the reference, and who refuses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import is_installed
from isas import ISAS, UseIsa, emulator, use_isa  # noqa: F401 (fixtures)
from parallel_parnet import Config, Engine, ParNetError, Placement, Program, fold, quantize
from parallel_parnet.choice import on_gpus
from parallel_parnet.executors.answers import Answer
from parallel_parnet.program.contract import INPUT
from parallel_parnet.program.program import Operation
from parallel_parnet.program.rivals import resnet, rival
from plans import borders_are_zeros, features, plan_of, poison, reference
from small import OPTIONAL, SMALL, lively, relative
from ungated import noise, random_placement, random_program, weights_of

NATIVE = pytest.mark.skipif("native" not in OPTIONAL, reason="the CPU kernels were not compiled")
CPU = torch.device("cpu")
TINY = resnet((1, 1), bottleneck=True, width=8, classes=10, size=64)


def far(got: Answer, expected: Answer) -> float:
    """The largest relative error of any answer."""
    if isinstance(got, Tensor):
        return relative(got, expected) if expected.any() else got.abs().max().item()
    return max(far(got[name], expected[name]) for name in expected)


def pictures(program: Program, draw: st.DrawFn) -> Tensor:
    m = program.size_multiple
    return noise(draw, draw(st.integers(1, 2)), 3, m * draw(st.integers(1, 3)), m * draw(st.integers(1, 3)))


@NATIVE
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_programs_by_native(data: st.DataObject, use_isa: UseIsa) -> None:  # noqa: F811
    program = random_program(data.draw)
    x = pictures(program, data.draw)
    threads, expected = data.draw(st.integers(1, 3)), reference(program, x)
    expected = expected if program.outputs else {"logits": expected}
    for isa in ISAS:
        with use_isa(isa):
            plan = plan_of(program, x.shape, threads)
            poison(plan)
            got = dict(zip(plan.module.segment.writes, plan(x), strict=True))
            assert far({name: got[feature] for name, feature in program.answers.items()}, expected) < 3e-5, isa
            assert borders_are_zeros(plan), isa


@settings(max_examples=15, deadline=None)
@given(st.data())
@pytest.mark.parametrize("executor", ["eager", *OPTIONAL])
def test_random_programs_on_any_lanes(executor: str, data: st.DataObject) -> None:
    """Normalised and raw, so that the shift of black pixels meets kernels of every size."""
    program = random_program(data.draw, operations=4, widths=(1, 12))
    lanes = data.draw(st.integers(1, 3))
    placement = random_placement(program, lanes, data.draw) if lanes > 1 else None
    engine = Engine(program, placement, "cpu", executor=executor)
    x = pictures(program, data.draw)
    for batch in (x, (x * 60 + 120).clamp(0, 255).to(torch.uint8)):
        assert far(engine(batch), reference(program, batch)) < 3e-5


@pytest.mark.parametrize("executor", ["eager", *OPTIONAL])
def test_a_lane_of_what_needs_no_scratch_memory(executor: str) -> None:
    kinds = [op.kind for op in TINY.operations]
    where = {op.name: (int(op.kind == "maxpool"),) for op in TINY.operations}
    assert "maxpool" in kinds
    x = torch.randn(1, 3, 64, 64)
    got = Engine(TINY, Placement(2, where), "cpu", executor=executor)(x)
    assert far(got, reference(TINY, x)) < 3e-5


@NATIVE
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_programs_in_bf16(data: st.DataObject, use_isa: UseIsa) -> None:  # noqa: F811
    program = random_program(data.draw, operations=4)
    x = pictures(program, data.draw)
    expected = reference(program, x)
    for isa in ISAS:
        with use_isa(isa):
            got = Engine(program, device="cpu", executor="native", dtype=torch.bfloat16)(x)
            assert far(got, expected) < 5e-2, isa


@NATIVE
def test_sums_are_kept_for_who_reads_them() -> None:
    plan = plan_of(TINY, (1, 3, 64, 64))
    summed = [feature for feature in features(plan) if feature.sums is not None]
    assert len(summed) == 1, "the classifier's feature alone"


@NATIVE
def test_a_gate_beside_a_wide_kernel() -> None:
    """Both read the picture, around which there are then three zeros."""
    wide = Operation("wide", "conv", "stem", None, 1, (INPUT,), 3, 3, gate="none", activation="silu", kernel=7)
    gated = Operation("gated", "conv", "stem", None, 1, (INPUT,), 3, 3, gate="identity", activation="silu")
    sum_ = Operation(
        "sum", "conv", "stream", 0, 2, ("wide", "gated"), 3, 3, gate="none", activation="none", residual=True
    )
    head = Operation("fc", "classifier", "head", None, 3, ("sum",), 3, 10)
    operations = [wide, gated, sum_, head]
    program = Program(Config((8, 8), blocks=(1,), num_classes=10), tuple(operations), weights_of(operations, 0))
    x = torch.randn(2, 3, 32, 64)
    raw = (x * 60 + 120).clamp(0, 255).to(torch.uint8)
    for batch in (x, raw):
        got = Engine(program, device="cpu", executor="native")(batch)
        assert relative(got, reference(program, batch)) < 1e-5


@pytest.mark.parametrize("executor", ["reference", "eager", *OPTIONAL])
def test_the_largest_value_is_no_zero_from_outside(executor: str) -> None:
    """Where all values are below zero; and a NaN is not hidden."""
    weights = dict(TINY.weights) | {"stem.bias": torch.full((8,), -100.0)}
    operations = [replace(op, activation="none") if op.name == "stem" else op for op in TINY.operations]
    program = Program(TINY.config, tuple(operations), weights, {"pool": "pool"} | {"logits": "fc"})
    engine, x = Engine(program, device="cpu", executor=executor), torch.randn(1, 3, 64, 64)
    assert engine(x)["pool"].max() < -50
    if executor != "openvino":
        x[0, 1, 20, 20] = torch.nan
        got = engine(x)
        assert torch.equal(got["pool"].isnan(), reference(program, x)["pool"].isnan())
        assert got["logits"].isnan().all()


def test_all_executors_of_gpus_are_tried() -> None:
    assert {choice.executor for choice in on_gpus(TINY, None)} == {"eager", "triton", "cuda_graph"}, "one stream"


def test_no_int8() -> None:
    with pytest.raises(ParNetError, match="int8 and fp8 are for ParNets"):
        quantize(TINY, torch.randn(1, 3, 64, 64))
    steps = {"stem.step": torch.ones(1), "stem.zero": torch.zeros(1, dtype=torch.uint8)}
    with pytest.raises(ParNetError, match="'stem': a quantised program has gated convolutions"):
        Program(TINY.config, TINY.operations, {**TINY.weights, **steps})


@pytest.mark.skipif(not (is_installed("onnx") and is_installed("onnxruntime")), reason="onnx is not installed")
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_as_onnx(data: st.DataObject) -> None:
    import onnxruntime

    program = random_program(data.draw, operations=4, widths=(1, 12))
    x = pictures(program, data.draw)
    session = onnxruntime.InferenceSession(program.to_onnx().SerializeToString(), providers=["CPUExecutionProvider"])
    got = dict(zip(program.answers, map(torch.from_numpy, session.run(list(program.answers), {"input": x.numpy()}))))
    expected = reference(program, x)
    assert far(got, expected if program.outputs else {"logits": expected}) < 3e-5


def test_as_torch_export() -> None:
    x = torch.randn(1, 3, 96, 64)
    assert relative(TINY.to_exported_program().module()(x), reference(TINY, x)) < 1e-6


def test_files(tmp_path: Path) -> None:
    """What came later is in files that need it, and in no others."""
    TINY.save(tmp_path / "tiny.safetensors")
    assert Program.load(tmp_path / "tiny.safetensors").operations == TINY.operations
    described = json.dumps(fold(lively(SMALL, 0))._description())
    assert "kernel" not in described and "residual" not in described
    assert np.mean(['"residual": true' in json.dumps(op.described) for op in TINY.operations]) > 0


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("stem", {"kernel": 5}, "kernel 5: choose one of 1, 3, 7"),
        ("stem", {"kernel": True}, "kernel True: must be an integer"),
        ("blocks.0.convolutions.0", {"kernel": 7}, "a 7x7 convolution reads the picture"),
        ("blocks.0.convolutions.0", {"residual": True}, "true where the last of several inputs is added"),
        ("blocks.0.convolutions.0", {"residual": 0}, "residual 0: true or false"),
        ("blocks.0.convolutions.0", {"gate": "plain", "activation": "none"}, "a gated convolution is 3x3"),
        ("blocks.0.convolutions.2", {"gate": "plain", "kernel": 3}, "without a residual"),
        ("blocks.0.convolutions.2", {"stride": 2}, "its residual must have the output's channels"),
        ("blocks.0.convolutions.2", {"cout": 16}, "its residual must have the output's channels"),
        ("blocks.0.convolutions.2", {"shuffle": 2}, "nothing may be shuffled"),
        ("pool", {"cout": 4}, "as many channels"),
        ("pool", {"kernel": 1}, "a maxpool has no groups"),
        ("pool", {"inputs": (INPUT,), "cin": 3, "cout": 3, "level": 1}, "a maxpool reads features, not the picture"),
        ("fc", {"kernel": 1}, "a classifier has no stride"),
    ],
)
def test_contract(name: str, fields: dict, message: str) -> None:
    operations = tuple(replace(op, **fields) if op.name == name else op for op in TINY.operations)
    with pytest.raises(ParNetError, match=message):
        Program(TINY.config, operations, TINY.weights)


def test_every_rival_runs_by_what_auto_takes() -> None:
    engine: Callable[[Tensor], Answer] = Engine(rival("repvgg_a0"), device="cpu")
    assert far(engine(torch.zeros(1, 3, 32, 32)), reference(rival("repvgg_a0"), torch.zeros(1, 3, 32, 32))) < 1e-5
