"""Programs as ONNX models and as torch.export has them: any network, in other hands, gives the engine's answers."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel_parnet import Config, Engine, ParNetError, Program, fold
from program.test_fold import configs
from small import SMALL, lively, relative

PROGRAM = fold(lively(SMALL, 3))
STANDARD = {
    "Add", "Cast", "Concat", "ConstantOfShape", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "Identity", "Mul",
    "Relu", "Shape", "Sigmoid", "Split",
}  # fmt: skip


def installed(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed here: {', '.join(missing)}")


def reference(program: Program, x: Tensor) -> Tensor:
    return Engine(program, device="cpu", executor="reference")(x)


@installed("onnx", "onnxruntime")
@settings(max_examples=15, deadline=None)
@given(config=configs(), seed=st.integers(0, 2**31), raw=st.booleans())
def test_any_network_in_onnx(config: Config, seed: int, raw: bool) -> None:
    import onnxruntime

    program = fold(lively(config, seed))
    model = program.to_onnx(raw)
    assert {node.op_type for node in model.graph.node} <= STANDARD
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    m = program.size_multiple
    for n, h, w in ((1, m, m), (3, 2 * m, m)):
        x = torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8) if raw else torch.randn(n, 3, h, w)
        (got,) = session.run(["logits"], {"input": x.numpy()})
        expected = reference(program, x)
        difference = (torch.from_numpy(got) - expected).norm()
        # a few of such networks lose five bits to cancellation, ours and the reader's alike
        assert difference < 1e-4 * (expected.norm() + program.weights["head.fc.bias"].norm())


@installed("onnx")
def test_the_model_says_what_it_is() -> None:
    import onnx

    model = PROGRAM.to_onnx(raw=True)
    (picture,), (logits,) = model.graph.input, model.graph.output
    assert picture.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in picture.type.tensor_type.shape.dim] == ["batch", 3, "height", "width"]
    assert (logits.name, logits.type.tensor_type.shape.dim[1].dim_value) == ("logits", 10)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert Config.of(json.loads(said["config"])) == PROGRAM.config and said["digest"] == PROGRAM.digest
    assert {tensor.name for tensor in model.graph.initializer} >= PROGRAM.weights.keys()


@installed("onnx", "onnxruntime")
def test_a_classifier_that_reads_a_feature_twice() -> None:
    import onnxruntime

    classifier = PROGRAM.operations[-1]
    twice = replace(classifier, inputs=classifier.inputs * 2, cin=classifier.cin * 2)
    weight = PROGRAM.weights["head.fc.weight"]
    weights = dict(PROGRAM.weights) | {"head.fc.weight": torch.cat([weight, -weight / 2], 1)}
    program = Program(PROGRAM.config, (*PROGRAM.operations[:-1], twice), weights)
    session = onnxruntime.InferenceSession(program.to_onnx().SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(1, 3, 64, 64)
    (got,) = session.run(["logits"], {"input": x.numpy()})
    assert relative(torch.from_numpy(got), reference(program, x)) < 1e-5


def test_torch_export() -> None:
    """Saved, loaded and run at another batch and size than it was traced with, whatever device was the caller's."""
    file = io.BytesIO()
    with torch.device("meta"):
        torch.export.save(PROGRAM.to_exported_program(raw=True), file)
    file.seek(0)
    module = torch.export.load(file).module()
    for n, h, w in ((1, 64, 64), (4, 128, 96)):
        x = torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8)
        assert relative(module(x), reference(PROGRAM, x)) < 1e-5
    assert module.to("meta")(x.to("meta")).is_meta, "weights are buffers, and move with the module"


@installed("onnx")
def test_what_no_file_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel_parnet.program.onnx_graph.MOST_BYTES", 1000)
    with pytest.raises(ParNetError, match="an ONNX file holds 2 GB"):
        PROGRAM.to_onnx()


@installed("onnx")
def test_an_operator_that_onnx_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel_parnet.program.onnx_graph.OPSET", 11)  # whose Split takes its sizes otherwise
    with pytest.raises(ParNetError, match=r"ONNX cannot hold this network: .*Split"):
        PROGRAM.to_onnx()


def test_without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ParNetError, match=r"onnx is not installed here: pip install .*\[export\]"):
        PROGRAM.to_onnx()


NCNN = """import ncnn
net = ncnn.Net()
net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
net.load_param("m.ncnn.param")
net.load_model("m.ncnn.bin")
run = net.create_extractor()
run.input("in0", ncnn.Mat(x[0]))
answer = run.extract("out0")[1]
"""
# the command mnnconvert would install packages, and report to its maker
MNN = """import MNN
from _tools import mnnconvert
mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", "m.onnx", "--MNNModel", "m.mnn", "--bizCode", "parnet"])
net = MNN.Interpreter("m.mnn")
session = net.createSession({"precision": "high", "numThread": 1})
place = net.getSessionInput(session)
net.resizeTensor(place, x.shape)
net.resizeSession(session)
place.copyFrom(MNN.Tensor(x.shape, MNN.Halide_Type_Float, x, MNN.Tensor_DimensionType_Caffe))
net.runSession(session)
answer = net.getSessionOutput(session).getData()
"""


def answer_of(code: str, folder: Path, x: Tensor) -> Tensor:
    """What code, in a process without torch, makes of m.onnx and x."""
    np.save(folder / "x.npy", x.numpy())
    code = f"import numpy as np\nx = np.load('x.npy')\n{code}\nnp.save('y.npy', np.array(answer, np.float32))"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=60)
    return torch.from_numpy(np.load(folder / "y.npy"))


@installed("onnx", "pnnx", "ncnn")
def test_ncnn_takes_it(tmp_path: Path) -> None:
    import onnx

    onnx.save(PROGRAM.to_onnx(), tmp_path / "m.onnx")
    spec, x = importlib.util.find_spec("pnnx"), torch.randn(1, 3, 64, 96)
    assert spec is not None and spec.origin is not None
    converter = Path(spec.origin).with_name("pnnx")
    subprocess.run([converter, "m.onnx", "inputshape=[1,3,64,96]", "fp16=0"], cwd=tmp_path, check=True, timeout=60)
    assert relative(answer_of(NCNN, tmp_path, x), reference(PROGRAM, x)[0]) < 1e-5


@installed("onnx", "MNN")
def test_mnn_takes_it(tmp_path: Path) -> None:
    import onnx

    onnx.save(PROGRAM.to_onnx(), tmp_path / "m.onnx")
    x = torch.randn(1, 3, 64, 96)
    assert relative(answer_of(MNN, tmp_path, x).flatten(), reference(PROGRAM, x)[0]) < 1e-4  # it uses Winograd's F(4x4)
