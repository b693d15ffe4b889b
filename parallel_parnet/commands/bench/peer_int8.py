"""Libraries in int8, quantised after training as each documents it, all by the same pictures."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .machine import has_vnni
from .peer_libraries import exported, need, onnx, onnxruntime_runner, openvino_model, openvino_runner
from .peer_torch import FORMATS, packed
from .subject import CALIBRATING, Contender, Runner, Subject


def int8_peers() -> list[Contender]:
    """OpenVINO and ONNX Runtime, from the fused network and from the file of launch/export.py, and torch. Each for one
    picture at a time on a CPU."""
    return [
        Contender("OpenVINO, fused", False, lambda s: _openvino(s, s.fused)),
        Contender("OpenVINO, exported", False, lambda s: _openvino(s, None)),
        Contender("ONNX Runtime, fused", False, lambda s: _onnxruntime(s, s.fused)),
        Contender("ONNX Runtime, exported", False, lambda s: _onnxruntime(s, None)),
        Contender("torch.compile, fused", False, _torch),
    ]


def _openvino(subject: Subject, network: nn.Module | None) -> Runner:
    """By NNCF; the preset is the one for activations with negative values. OpenVINO chooses the type of what stays in
    floats: bf16 on CPUs that have it."""
    os.environ.setdefault("NNCF_CI", "1")  # or it reports to its maker
    nncf, model = need("nncf", "nncf"), openvino_model(subject, network)
    nncf.set_log_level(logging.ERROR)
    pictures = nncf.Dataset([picture.numpy() for picture in subject.calibration.split(1)])
    ways = {"preset": nncf.QuantizationPreset.MIXED, "target_device": nncf.TargetDevice.CPU}
    with redirect_stdout(StringIO()):  # where it shows its progress
        model = nncf.quantize(model, pictures, subset_size=CALIBRATING, **ways)
    runner = openvino_runner(model, subject, f"{'fused' if network else 'exported'}, nncf.quantize(preset=MIXED)", {})
    rest = "" if runner.arithmetic == "float32" else f", {runner.arithmetic}"
    return replace(runner, arithmetic=f"int8{rest}")


def _onnxruntime(subject: Subject, network: nn.Module | None) -> Runner:
    """Unsigned activations and signed weights, as it advises for x86-64, where signed activations have slow kernels.
    All but the convolutions stays in fp32: in int8 it was no faster on ParNet-S, and its rounding adds to the error."""
    need("onnxruntime", "'parallel_parnet[bench]'")
    model = exported(subject) if network is None else onnx(network, subject)
    from onnx import load_from_string
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = load_from_string(model).graph.input[0].name
    feed = iter([{name: picture.numpy()} for picture in subject.calibration.split(1)])
    ways = {"per_channel": True, "reduce_range": not has_vnni(), "op_types_to_quantize": ["Conv"]}
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    with TemporaryDirectory() as folder:
        given, prepared, made = (Path(folder, f"{name}.onnx") for name in ("given", "prepared", "made"))
        given.write_bytes(model)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        reader = SimpleNamespace(get_next=lambda: next(feed, None))
        quantize_static(prepared, made, reader, quant_format=QuantFormat.QDQ, **ways, **types)
        runner = onnxruntime_runner(made.read_bytes(), subject)
    return replace(runner, settings=f"quantize_static(QDQ, U8S8, {ways}), {runner.settings}", arithmetic="int8")


def _torch(subject: Subject) -> Runner:
    """PyTorch 2 export quantisation with torchao's quantizer for x86, lowered by Inductor with its C++ wrapper."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns that it has no kernels for GPUs here
    need("torchao", "torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    layout = FORMATS["channels_last"]
    example = subject.pictures(1)[0].contiguous(memory_format=layout)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=not has_vnni()))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's and the compiler's own use of torch
        network = torch.export.export(deepcopy(subject.fused).to(memory_format=layout), (example,)).module()
        prepared = prepare_pt2e(network, quantizer)
        for picture in subject.calibration.split(1):
            prepared(picture.contiguous(memory_format=layout))
        compiled = torch.compile(convert_pt2e(prepared), fullgraph=True, dynamic=False)

        @torch.inference_mode()
        def call(x_nchw: Tensor) -> Tensor:
            return compiled(x_nchw.contiguous(memory_format=layout))

        settings = "PT2E, X86InductorQuantizer, torch.compile(dynamic=False), freezing, cpp_wrapper, channels_last"
        return packed(Runner(call, settings, "int8"), subject, cpp_wrapper=True)
