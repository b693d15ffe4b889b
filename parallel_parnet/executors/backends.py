"""Ways to run a segment on the CPU or on a GPU through torch: as it is, by Inductor, or by OpenVINO."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from .segment import SegmentModule

Runner = Callable[..., tuple[Tensor, ...]]

BACKENDS = ("eager", "inductor", "openvino")


def has_openvino() -> bool:
    """Whether the optional package is installed."""
    return importlib.util.find_spec("openvino") is not None


def storage_type(backend: str, dtype: torch.dtype) -> torch.dtype:
    """Type of features and weights as torch sees them. OpenVINO is told the precision and converts by itself."""
    return torch.float32 if backend == "openvino" else dtype


def compile_segment(module: SegmentModule, backend: str, reads: tuple[Tensor, ...], dtype: torch.dtype) -> Runner:
    """A function from the segment's reads to its writes. `reads` shows shapes and memory formats to specialise for."""
    if backend == "openvino":
        return _openvino(module, reads, dtype)
    if backend == "inductor":
        # exported first, since torch.compile limits how often it specialises one piece of source code; freezing folds
        # layout changes of the weights into compile time
        graph = torch.export.export(module, reads).module()
        return torch.compile(graph, fullgraph=True, dynamic=False, options={"freezing": True})
    return module


def _openvino(module: SegmentModule, reads: tuple[Tensor, ...], dtype: torch.dtype) -> Runner:
    import openvino

    model = openvino.convert_model(module, example_input=reads)
    for port, tensor in zip(model.inputs, reads, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(list(tensor.shape)))
    model.validate_nodes_and_infer_types()
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        results = request.infer([t.contiguous().numpy() for t in inputs], share_inputs=True, share_outputs=False)
        return tuple(torch.from_numpy(results[i]) for i in range(len(module.segment.writes)))

    return run
