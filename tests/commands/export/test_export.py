"""launch/export.py as a user runs it: files that were checked, or none."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import ROOT, launch
from parallel_parnet import Config, Engine, ParNetError, fold, load_checkpoint, save_checkpoint
from parallel_parnet.commands.export import checks, command
from small import lively, relative

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the packages of parallel_parnet[export]")
pytest.importorskip("onnx", reason="needs the packages of parallel_parnet[export]")
TINY = Config((4, 8, 8), blocks=(1, 1), num_classes=3, image_size=64)
DEMO = ROOT / "launch" / "demo" / "parnet_fashion.safetensors"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
    return command.main()


def test_the_demo(tmp_path: Path) -> None:
    run = launch("export.py", "--onnx", tmp_path / "demo.onnx")
    assert "batches 1, 2, 3 of 32 and 64 pixels" in run.stdout and "ONNX Runtime" in run.stdout
    x = torch.randn(5, 3, 32, 32)
    expected = Engine(fold(load_checkpoint(DEMO)), device="cpu")(x)
    session = onnxruntime.InferenceSession(tmp_path / "demo.onnx", providers=["CPUExecutionProvider"])
    assert relative(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), expected) < 1e-5


def test_a_backbone_in_both_kinds_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(lively(TINY, 1), tmp_path / "small.safetensors")
    wanted, names = ["--onnx", tmp_path / "o", "--pt2", tmp_path / "p"], ["streams.1", "fused"]
    assert call(monkeypatch, "--checkpoint", tmp_path / "small.safetensors", *wanted, "--outputs", *names) == 0
    session = onnxruntime.InferenceSession(tmp_path / "o", providers=["CPUExecutionProvider"])
    x = torch.randn(1, 3, 64, 96)
    expected = Engine(fold(lively(TINY, 1), outputs=names), device="cpu", executor="reference")(x)
    assert [o.name for o in session.get_outputs()] == names
    module = torch.export.load(tmp_path / "p").module()
    for in_onnx, in_torch, name in zip(session.run(None, {"input": x.numpy()}), module(x), names, strict=True):
        assert relative(torch.from_numpy(in_onnx), expected[name]) < 1e-5
        assert relative(in_torch, expected[name]) < 1e-5


def test_raw_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    save_checkpoint(lively(TINY, 1), tmp_path / "small.safetensors")
    assert call(monkeypatch, "--checkpoint", tmp_path / "small.safetensors", "--raw", "--onnx", tmp_path / "o") == 0
    said = capsys.readouterr().out
    assert "input uint8, RGB" in said and "random" not in said
    assert call(monkeypatch, "--num-classes", 3, "--onnx", tmp_path / "o") == 0
    assert "the weights are random, so the answers mean nothing" in capsys.readouterr().out


def test_a_network_whose_own_pictures_end_as_one_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """torch.export has no open size that may be 1, so its file begins at the next, and says so."""
    model = lively(Config((4, 8, 8, 8), blocks=(1, 1, 1), num_classes=3, image_size=32), 1)
    save_checkpoint(model, tmp_path / "small.safetensors")
    words = ("--checkpoint", tmp_path / "small.safetensors", "--onnx", tmp_path / "o", "--pt2", tmp_path / "p")
    assert call(monkeypatch, *words) == 0
    onnx, pt2 = capsys.readouterr().out.split(f"{tmp_path / 'p'}: ")
    assert "of 32 and 64 pixels" in onnx and "cannot hold" not in onnx and "of 64 and 96 pixels" in pt2
    assert "multiples of 32 from 64\n  note: a .pt2 file cannot hold the network for its own 32 pixels" in pt2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to write: give --onnx FILE, --pt2 FILE, or both"),
        (["--onnx", "nowhere/demo.onnx"], r"nowhere/demo.onnx: cannot be written \(no such folder\)"),
        (["--pt2", "."], r"\.: cannot be written \(a folder; name a file\)"),
        (
            ["--onnx", "demo.onnx", "--outputs", "streams.7"],
            r"outputs \['streams.7'\]: give a tuple of some of streams.0",
        ),
        (["--onnx", "/proc/demo.onnx"], "/proc/demo.onnx: cannot be written"),
    ],
)
def test_refusals(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParNetError, match=message):
        call(monkeypatch, *words)
    assert not os.listdir(tmp_path)


def test_a_logit_near_zero_is_no_difference() -> None:
    """A network of one class, whose answer to the first picture is next to nothing."""
    program = fold(lively(replace(TINY, num_classes=1), 1))
    sides = checks.sizes(program)
    first = Engine(program, device="cpu", executor="reference")(next(checks.pictures(sides, False)))
    program.weights["head.fc.bias"] -= first[0]
    readers = checks.onnx_readers(program.to_onnx().SerializeToString(), ["logits"])
    assert checks.agree(program, sides, False, readers)["ONNX Runtime"] < 1e-5


def test_every_output_is_compared() -> None:
    names = ["streams.1", "fused"]
    program = fold(lively(TINY, 1), outputs=names)
    engine = Engine(program, device="cpu", executor="reference")
    for wrong in names:
        run = lambda x, wrong=wrong: [answer * (1 + 1e-3 * (name == wrong)) for name, answer in engine(x).items()]  # noqa: E731
        with pytest.raises(ParNetError, match=r"planted is off by 1\.0e-03"):
            checks.agree(program, checks.sizes(program), False, {"planted": run})


@pytest.mark.parametrize("kind", ["wrong", "broken", "silent"])
def test_an_answer_that_differs_leaves_the_old_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: Tensor) -> list[Tensor]:
        if kind == "broken":
            raise RuntimeError("no kernel for Conv\nmore of it")
        if kind == "silent":
            raise MemoryError
        return [1.001 * torch.ones(len(x), 10)]

    monkeypatch.setattr(checks, "_onnxruntime", lambda model, names: run)
    (tmp_path / "demo.onnx").write_text("the old file")
    with pytest.raises(
        ParNetError, match=r"ONNX Runtime (is off|cannot run it \((no kernel for Conv|MemoryError)\)).*nothing written"
    ):
        call(monkeypatch, "--onnx", tmp_path / "demo.onnx")
    assert (tmp_path / "demo.onnx").read_text() == "the old file" and len(os.listdir(tmp_path)) == 1


def test_nothing_that_could_check_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda package: package == "onnx" or None)
    with pytest.raises(ParNetError, match="nothing here can check an ONNX file"):
        call(monkeypatch, "--onnx", tmp_path / "demo.onnx")
    assert not os.listdir(tmp_path)
