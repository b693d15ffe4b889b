"""LiteRT and ExecuTorch, whose kernels for CPUs are XNNPACK's, from the program that launch/export.py --pt2 writes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from parallel_parnet import ParNetError

from .peer_libraries import need
from .subject import Contender, Runner, Subject


def xnnpack_peers() -> list[Contender]:
    """In fp32 whatever type is asked for, as ONNX Runtime: a user may take the faster of both."""
    return [Contender("LiteRT, exported", False, _litert), Contender("ExecuTorch, exported", False, _executorch)]


def xnnpack_int8_peer() -> Contender:
    """LiteRT's converter could make no int8 network of ParNet."""
    return Contender("ExecuTorch, exported", False, _executorch_int8)


def _litert(subject: Subject) -> Runner:
    _on_the_cpu(subject)
    runtime = need("ai_edge_litert.interpreter", "ai-edge-litert")
    converter = need("litert_torch", "litert-torch")
    with TemporaryDirectory() as folder, _quiet():
        file = Path(folder, "m.tflite")
        converter.convert(_static(subject).module(), (subject.pictures(1)[0],)).export(str(file))
        interpreter = runtime.Interpreter(model_content=file.read_bytes(), num_threads=subject.threads)
    interpreter.allocate_tensors()
    picture, logits = (end()[0]["index"] for end in (interpreter.get_input_details, interpreter.get_output_details))

    def call(x_nchw: Any) -> Any:
        interpreter.set_tensor(picture, x_nchw)
        interpreter.invoke()
        return interpreter.get_tensor(logits)

    settings = f"litert_torch.convert, XNNPACK, num_threads={subject.threads}"
    return Runner(call, settings, "float32", take=lambda x_nchw: x_nchw.numpy(), logits=torch.from_numpy)


def _executorch(subject: Subject) -> Runner:
    _on_the_cpu(subject)
    return _lowered(subject, _static(subject), "float32", "")


def _executorch_int8(subject: Subject) -> Runner:
    """Symmetric, weights by channel, as its documentation quantises for XNNPACK."""
    quantizer = need("executorch.backends.xnnpack.quantizer.xnnpack_quantizer", "executorch")
    need("torchao", "torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    ways = quantizer.get_symmetric_quantization_config(is_per_channel=True)
    with torch.no_grad(), _quiet():
        prepared = prepare_pt2e(_static(subject).module(), quantizer.XNNPACKQuantizer().set_global(ways))
        for picture in subject.calibration.split(1):
            prepared(picture)
        quantised = torch.export.export(convert_pt2e(prepared), (subject.pictures(1)[0],))
    return _lowered(subject, quantised, "int8", "XNNPACKQuantizer, symmetric, weights by channel, ")


def _lowered(subject: Subject, program: ExportedProgram, arithmetic: str, how: str) -> Runner:
    partitioner = need("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    with _quiet():
        made = to_edge_transform_and_lower(program, partitioner=[partitioner.XnnpackPartitioner()]).to_executorch()
    portable_lib._unsafe_reset_threadpool(subject.threads)
    loaded = Runtime.get().load_program(made.buffer)
    method = loaded.load_method("forward")

    def call(x_nchw: Tensor, owners: object = (made, loaded)) -> Tensor:  # whose memory the method uses
        return method.execute((x_nchw,))[0]

    settings = f"{how}to_edge_transform_and_lower(XnnpackPartitioner), {subject.threads} threads"
    return Runner(call, settings, arithmetic, logits=torch.clone)


def _static(subject: Subject) -> ExportedProgram:
    """The exported program for pictures of the subject's shape alone."""
    program = torch.export.export(subject.program.to_exported_program().module(), (subject.pictures(1)[0],))
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.mean.dim:
            node.kwargs = {}  # the type of the sum, which LiteRT's converter does not know: fp32, as that of its input
    return program


def _on_the_cpu(subject: Subject) -> None:
    if subject.device.type != "cpu":
        raise ParNetError("runs on the CPU here")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what converters tell of their own use of torch."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
