"""Segments through OpenVINO on the CPU: one lane, or lanes that share the cores and really run side by side."""

from __future__ import annotations

import openvino
import torch
from torch import Tensor

from ..profiling.spans import Recorder
from ..program.placement import Placement
from ..program.program import Program
from .answers import Answer, collected, each
from .binding import address
from .local import LocalExecutor
from .openvino_model import compile_model, model_of
from .schedule import START, sources
from .segment import SegmentModule
from .shapes import Shapes
from .torch_backend import TorchBackend

LAYOUT = torch.contiguous_format
CPU = torch.device("cpu")


class _Bound:
    """The segments for one shape of input, each bound to the features that others of them compute."""

    def __init__(
        self, program: Program, modules: list[SegmentModule], shape: tuple[int, ...], dtype: torch.dtype, threads: int
    ) -> None:
        n, _, h, w = shape
        segments = [module.segment for module in modules]
        alone = len({segment.lane for segment in segments}) == 1
        features: dict[tuple[str, int], openvino.Tensor] = {}
        self.requests: list[openvino.InferRequest] = []
        self.pictures: list[tuple[openvino.InferRequest, int]] = []
        self.waits: list[list[openvino.InferRequest]] = []
        self.bound = 0  # address of the pictures that the requests read
        for i, (module, writers) in enumerate(zip(modules, sources(segments), strict=True)):
            model = model_of(module, [program.shape(name, n, h, w) for name in module.segment.reads])
            request = compile_model(model, dtype, threads, alone).create_infer_request()
            for index, (name, writer) in enumerate(zip(module.segment.reads, writers, strict=True)):
                if writer == START:
                    self.pictures.append((request, index))
                else:
                    request.set_input_tensor(index, features[name, writer])
            features |= {(name, i): request.get_output_tensor(k) for k, name in enumerate(module.segment.writes)}
            self.waits.append([self.requests[writer] for writer in {*writers} - {START}])
            self.requests.append(request)
        made = {name: tensor for (name, _), tensor in features.items()}
        self.answer = collected(program, lambda name: torch.from_numpy(made[name].data))

    def run(self, x_nchw: Tensor) -> None:
        """Fill `answer` from pictures fp32, contiguous, which are read where they lie."""
        at = address(x_nchw)
        if at != self.bound:  # whoever comes again with the same memory saves 30 us
            self.bound = at
            picture = openvino.Tensor(x_nchw.detach().numpy(), shared_memory=True)  # keeps that memory from reuse
            for request, index in self.pictures:
                request.set_input_tensor(index, picture)
        if len(self.requests) == 1:
            self.requests[0].infer(share_inputs=True, share_outputs=True)  # in this thread: no hand-over
            return
        for request, waits in zip(self.requests, self.waits, strict=True):
            for other in waits:
                other.wait()
            request.start_async(share_inputs=True)
        for request in self.requests:
            request.wait()


class OpenVinoExecutor:
    """Runs a placement in one process; a lane is a share of the cores.

    A segment starts as soon as the segments that it reads from have ended, on threads of its lane's own, while this
    thread goes on to start the next. Features stay where they were computed. threads: of each lane; all cores' share
    where not given.
    """

    def __init__(self, program: Program, placement: Placement, dtype: torch.dtype, threads: int | None = None) -> None:
        self.program, self.placement, self.precision = program, placement, dtype
        self.threads = threads or max(1, torch.get_num_threads() // placement.lanes)
        self.modules = [SegmentModule(program, s, torch.float32, CPU, LAYOUT) for s in placement.segments(program)]
        self._shapes: Shapes[tuple[int, ...], _Bound] = Shapes()

    def __call__(self, x_nchw: Tensor) -> Answer:
        """Logits, or outputs by name, fp32, on the picture's device."""
        bound = self._shapes(x_nchw.shape, self._bind)
        x = x_nchw if x_nchw.is_cpu and x_nchw.dtype == torch.float32 else x_nchw.to(CPU, torch.float32)
        bound.run(x.contiguous())
        return each(bound.answer, lambda tensor: tensor.to(x_nchw.device, copy=True))

    def _bind(self, shape: tuple[int, ...]) -> _Bound:
        return _Bound(self.program, self.modules, shape, self.precision, self.threads)

    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, operation by operation by torch, and return a recorder of spans for each lane."""
        devices = [CPU] * self.placement.lanes
        segments = self.placement.segments(self.program)
        backend = TorchBackend("reference", self.program, segments, devices, torch.float32)
        return LocalExecutor(self.placement, devices, backend).profile(x_nchw)
