"""Work as CUDA graphs: whole passes, replayed from buffers of their own, or a segment between two transfers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..profiling.spans import Recorder, Spans
from .answers import Answer, each, logits_of
from .binding import Reads, Runner, in_same_places
from .local import WHOLE_GPU, LocalExecutor, Pass
from .shapes import Shapes

Result = TypeVar("Result")
Replay = Callable[[], object]


class Capture(Protocol):
    """Makes a CUDA graph of work that runs on a device: its results, and what fills them again."""

    def __call__(self, work: Callable[[], Result], device: torch.device) -> tuple[Result, Replay]: ...


class _Captured(NamedTuple):
    picture: Tensor
    answer: Answer
    replay: Replay
    kept: Pass  # owns what the replay reads and writes


def capture(work: Callable[[], Result], device: torch.device) -> tuple[Result, Replay]:
    """Capture `work` as a CUDA graph, after two runs that load and compile what it needs: its results, and the replay.

    Several GPUs' CUDA streams may be forked from the one under capture and joined again: one graph holds them all, and
    starts by one call. Other threads may use the GPU meanwhile: in the default mode, one of their unsafe calls would
    break the capture. On the CPU, where Triton's interpreter can stand in for a GPU, a replay does the work again.
    """
    if device.type != "cuda":
        first = work()
        return first, lambda: _fill(first, work())
    with WHOLE_GPU, torch.cuda.device(device):
        # of this device: the one that torch has for captures is of the GPU that captured first
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # around the capture as well, which does not leave it where it fails
            work()
            work()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                result = work()
        torch.cuda.current_stream().wait_stream(side)
    return result, graph.replay


class GraphExecutor:
    """Replays the passes of `source`. Not for several threads at once: the engine makes their calls take turns."""

    def __init__(self, name: str, source: LocalExecutor, capture: Capture = capture) -> None:
        self.name, self.source, self._capture = name, source, capture
        # a graph that is dropped may still be running, and its buffers would be handed to somebody else
        self._shapes: Shapes[torch.Size, _Captured] = Shapes(source.synchronise)

    def __call__(self, x_nchw: Tensor, out: Tensor | None = None) -> Answer:
        """Return logits, fp32: a copy on the pictures' device, or `out`, filled; or a copy of the outputs by name.

        Nothing is copied for arguments that are themselves the buffers which `buffers` gives.
        """
        captured = self._shapes(x_nchw.shape, self._make)
        with torch.inference_mode():
            if x_nchw is not captured.picture:
                captured.picture.copy_(x_nchw)
            captured.replay()
            if out is None:
                return each(captured.answer, lambda tensor: tensor.to(x_nchw.device, torch.float32, copy=True))
            if out is not captured.answer:
                out.copy_(logits_of(captured.answer))
            return out

    def buffers(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the graph's pictures and logits for this shape, which every call with this shape overwrites."""
        captured = self._shapes(shape, self._make)
        return captured.picture, logits_of(captured.answer)

    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run one pass that is not a graph, step by step: a recorder of spans for each lane."""
        return self.source.profile(x_nchw)

    @torch.no_grad()  # and not in inference mode, whose tensors no caller could fill
    def _make(self, shape: torch.Size) -> _Captured:
        made = self.source.make(shape)
        return _Captured(made.picture, *self._capture(made.launch, self.source.device), made)


class CapturedRunner:
    """A segment as a CUDA graph of its own, for a lane whose transfers no graph can hold. See `binding.Runner`."""

    def __init__(self, runner: Runner, reads: Reads, device: torch.device, capture: Capture = capture) -> None:
        self._runner, self._reads = runner, reads
        self._outputs, self._replay = capture(lambda: runner(reads), device)

    def fits(self, reads: Reads) -> bool:
        return in_same_places(reads, self._reads)

    def __call__(self, reads: Reads, spans: Spans | None = None) -> tuple[Tensor, ...]:
        self._replay()
        return self._outputs

    def run_stepwise(self, reads: Reads, spans: Spans) -> tuple[Tensor, ...]:
        return self._runner.run_stepwise(reads, spans)


def _fill(places: Any, values: Any) -> None:
    """Copy a tensor, or tensors, or tensors by name, into those of the first run."""
    if isinstance(places, dict):
        places, values = places.values(), values.values()
    pairs = [(places, values)] if isinstance(places, Tensor) else zip(places or (), values or (), strict=True)
    for place, value in pairs:
        place.copy_(value)
