"""The benchmark in int8: who takes part, that all calibrate on the same pictures, and what a failure costs."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch._dynamo.utils import counters

import parallel_parnet
from contenders import QUIET, planted
from parallel_parnet import Engine, ParNetError, Program, fold, load_checkpoint
from parallel_parnet.commands.bench import command as bench
from parallel_parnet.commands.bench import machine, peer_int8
from parallel_parnet.commands.bench.fused import fuse
from parallel_parnet.commands.bench.measure import Settings, contenders, measure
from parallel_parnet.commands.bench.peer_int8 import int8_peers
from parallel_parnet.commands.bench.peer_torch import _compiled
from parallel_parnet.commands.bench.peer_xnnpack import xnnpack_int8_peer
from parallel_parnet.commands.bench.proof import LIMITS, agrees, expected_logits
from parallel_parnet.commands.bench.rows import show
from parallel_parnet.commands.bench.running import Entry, set_up
from parallel_parnet.commands.bench.subject import Contender, Subject
from parallel_parnet.commands.common import DEMO, DEMO_MODEL
from small import relative

RATES = {kind: {"flop_per_s": 1e11, "bytes_per_s": 1e10} for kind in ("float32", "int8")}


@cache
def subject() -> Subject:
    """The demo: a network that is as wide as int8 wants, and small enough to quantise in a moment."""
    model = load_checkpoint(DEMO / f"{DEMO_MODEL}.safetensors").requires_grad_(False)
    size = model.config.image_size
    return Subject("demo", model, fuse(model), fold(model), size, 1, torch.device("cpu"), torch.int8, 1)


@cache
def compared() -> tuple[list[Tensor], list[Tensor]]:
    pictures = subject().pictures(128)  # of few, OpenVINO may be just beyond the limit by chance
    return pictures, expected_logits(subject(), pictures)


def peer(name: str) -> Contender:
    (found,) = (contender for contender in int8_peers() if contender.name == name)
    return found


def test_who_takes_part() -> None:
    names = [contender.name for contender in contenders([], torch.int8)]
    assert names[:2] == ["ours: auto", "ours: native"]
    assert set(names[2:]) == {contender.name for contender in (*int8_peers(), xnnpack_int8_peer())}
    assert "MNN, exported" in {contender.name for contender in contenders()}
    with pytest.raises(ParNetError, match="--only 'ncnn'"):
        contenders(["ncnn"], torch.int8)


def test_all_calibrate_on_the_same_pictures() -> None:
    pictures = subject().calibration
    assert pictures.shape == (32, 3, subject().size, subject().size)
    assert torch.equal(pictures, replace(subject(), name="in another process").calibration)
    assert abs(pictures.mean()) < 0.02 and abs(pictures.std() - 1) < 0.02
    assert len({picture.numpy().tobytes() for picture in pictures}) == 32


def test_ours_is_quantised_by_these_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in hands back a program that is off by a little, as a quantised one is."""

    def quantize(program: Program, pictures: Tensor) -> Program:
        assert pictures is subject().calibration
        weights = dict(program.weights)
        name = f"{program.output}.weight"
        weights[name] = weights[name] * 1.03
        return replace(program, weights=weights)

    monkeypatch.setattr(parallel_parnet, "quantize", quantize, raising=False)
    (ours,) = contenders(["ours: native"], torch.int8)
    found = set_up(ours, subject(), *compared())
    assert found.runner is not None, found.missing
    assert 1e-2 < found.error < 4e-2
    assert agrees(found)


@pytest.mark.parametrize(
    ("wrong", "dtype", "margin", "passes"),
    [(0.09, torch.int8, 1, True), (0.11, torch.int8, 1, False), (1e-4, torch.float32, 1, False),
     (1e-4, torch.float32, 20, True), (3e-4, torch.float32, 20, False), (float("nan"), torch.int8, 1, False)],
)  # fmt: skip
def test_limits(wrong: float, dtype: torch.dtype, margin: float, passes: bool) -> None:
    entry = Entry(Contender("x", False, None, margin), replace(subject(), dtype=dtype), error=wrong)  # type: ignore[arg-type]
    assert agrees(entry) is passes


def test_wrong_networks_are_beyond_the_limit() -> None:
    """One that always gives the same logits, the best of all such; and one with kernels turned around."""
    pictures, expected = compared()
    wanted = torch.cat(expected)
    assert relative(wanted.mean(0, keepdim=True).expand_as(wanted), wanted) > LIMITS[torch.int8]
    program = subject().program
    assert program is not None
    turned = {k: v.transpose(2, 3).contiguous() if v.ndim == 4 else v for k, v in program.weights.items()}
    engine = Engine(replace(program, weights=turned), device="cpu", executor="reference")
    assert relative(torch.cat([engine(x) for x in pictures]), wanted) > LIMITS[torch.int8]


def test_a_failure_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an absent package, of one that cannot be called, and of logits that are off, which the tables name."""
    monkeypatch.setitem(sys.modules, "nncf", None)
    broken = ModuleType("torchao")
    monkeypatch.setitem(sys.modules, "torchao", broken)
    off = [planted(f"off by {wrong}", wrong) for wrong in (0.05, 0.2)]
    chosen = [peer("OpenVINO, fused"), peer("torch.compile, fused"), *off]
    header = {"possible": RATES, "dtype": "int8"}
    found = measure(subject(), header, chosen, Settings(runs=3, least=3, warm_up=1), QUIET)
    assert found["missing"]["OpenVINO, fused"] == "not installed here: pip install nncf"
    assert found["missing"]["torch.compile, fused"].startswith("failed: ModuleNotFoundError: No module named 'torchao.")
    assert found["disagree"] == {"off by 0.2": "logits off by 2.0e-01, relative (limit 1e-01)"}
    (row,) = found["rows"]
    assert (row["contender"], row["dtype"], row["limit"]) == ("off by 0.05", "int8", 0.1)
    assert row["error"] == pytest.approx(0.05, rel=1e-3)
    json.dumps(found, allow_nan=False)
    console = Console(width=200, file=StringIO())
    show(found, console)
    assert "5.0e-02 (1e-01)" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["ONNX Runtime, fused", "ONNX Runtime, exported", "OpenVINO, fused"])
def test_installed_libraries_agree(name: str) -> None:
    needed = ("onnx", "onnxruntime") if name.startswith("ONNX") else ("openvino", "nncf")
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        pytest.skip(f"not installed here: {', '.join(missing)}")
    found = set_up(peer(name), subject(), *compared())
    assert found.runner is not None, found.missing
    assert 1e-3 < found.error < LIMITS[torch.int8], "int8 rounds more than floats do"
    assert found.runner.arithmetic.startswith("int8")


def test_nncf_is_given_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for NNCF that changes nothing: OpenVINO then gives what it gives in floats."""
    given = []

    def quantize(model: object, pictures: list, **ways: object) -> object:
        print("of its progress")
        given.append((pictures, ways))
        return model

    kinds = {"QuantizationPreset": SimpleNamespace(MIXED="mixed"), "TargetDevice": SimpleNamespace(CPU="cpu")}
    nncf = SimpleNamespace(quantize=quantize, Dataset=list, set_log_level=lambda level: None, **kinds)
    monkeypatch.setitem(sys.modules, "nncf", nncf)
    monkeypatch.delenv("NNCF_CI", raising=False)
    found = set_up(peer("OpenVINO, exported"), subject(), *compared())
    assert found.runner is not None, found.missing
    assert found.error < 2e-2
    ((pictures, ways),) = given
    assert np.array_equal(np.concatenate(pictures), subject().calibration.numpy())
    assert ways == {"preset": "mixed", "target_device": "cpu", "subset_size": 32}
    assert os.environ["NNCF_CI"], "or it reports"


def test_torchao_is_given_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for torchao, and the compiler, that change nothing: the network then gives what it gives in fp32."""
    seen: list[Tensor] = []
    asked: list[tuple] = []

    class Observed(nn.Module):
        def __init__(self, network: nn.Module, quantizer: object) -> None:
            super().__init__()
            self.network = network

        def forward(self, x_nchw: Tensor) -> Tensor:
            seen.append(x_nchw)
            return self.network(x_nchw)

    def compile_module(module: Observed, fullgraph: bool, dynamic: bool) -> nn.Module:
        def call(x_nchw: Tensor) -> Tensor:
            settings = torch._inductor.config
            asked.append((fullgraph, dynamic, settings.freezing, settings.cpp_wrapper))
            return module.network(x_nchw)

        return call  # type: ignore[return-value]

    quantizer = SimpleNamespace(set_global=lambda config: None)
    x86 = SimpleNamespace(
        X86InductorQuantizer=lambda: quantizer,
        get_default_x86_inductor_quantization_config=lambda reduce_range: asked.append(reduce_range),
    )
    pt2e = "torchao.quantization.pt2e"
    for name, content in {
        "torchao": ModuleType("torchao"),
        f"{pt2e}.quantize_pt2e": SimpleNamespace(prepare_pt2e=Observed, convert_pt2e=lambda prepared: prepared),
        f"{pt2e}.quantizer": SimpleNamespace(x86_inductor_quantizer=x86),
    }.items():
        monkeypatch.setitem(sys.modules, name, content)  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "compile", compile_module)
    monkeypatch.setattr(peer_int8, "has_vnni", lambda: False)
    found = set_up(peer("torch.compile, fused"), subject(), *compared())
    assert found.runner is not None, found.missing
    assert found.error < 1e-5
    assert torch.equal(torch.cat(seen), subject().calibration)
    assert all(picture.is_contiguous(memory_format=torch.channels_last) for picture in seen)
    assert asked[:2] == [True, (True, False, True, True)], "7 bits without VNNI; frozen while it is traced"
    assert set(asked[2:]) == {(True, False, False, False)}, "and nothing is left changed"


@pytest.mark.long
def test_weights_are_packed() -> None:
    """As torch's counters say; and what is compiled for one picture is not compiled again for another."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()).eval().requires_grad_(False)
    small = replace(subject(), network=network, fused=network, size=8, dtype=torch.float32)
    counters.clear()
    runner = _compiled(small, network)
    assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] == 1
    (picture,) = small.pictures(1)
    assert relative(runner.call(picture), network(picture)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


def test_what_a_product_in_int8_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    monkeypatch.setattr(machine, "SECONDS", 0.0)
    monkeypatch.setattr(machine, "COPIED", 2**10)
    monkeypatch.setattr(machine, "_best", lambda work: products.append(work()) or 0.5)
    found = machine.possible(torch.device("cpu"), torch.int8)
    assert list(found) == ["float32", "int8"]
    assert found["int8"]["flop_per_s"] == 4 * machine.SIDE**3
    assert found["int8"]["bytes_per_s"] == 2 * 2 * 4 * machine.COPIED, "read and written, in half a second"
    assert products[2].dtype == torch.int32, "added up in 32 bits"


def test_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.Ranks, "device", lambda ranks, wanted: torch.device("cuda"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--dtype", "int8", "--out", str(tmp_path)])
    with pytest.raises(ParNetError, match="runs on CPUs alone: add --device cpu"):
        bench.main()
