"""Forward passes as CUDA graphs: captured once for each shape of input, then replayed from buffers of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import ParNetError
from ..profiling.spans import Recorder
from .shapes import Shapes

Replay = Callable[[], None]


class Pass(Protocol):
    """A forward pass over buffers of its own: it reads `picture` and fills `logits`, fp32 [N, classes].

    `launch` allocates nothing that outlives it and never waits for the device, so that a CUDA graph can hold it.
    """

    @property
    def picture(self) -> Tensor: ...
    @property
    def logits(self) -> Tensor: ...
    def launch(self) -> None: ...


class Source(Protocol):
    """What makes a forward pass for a shape of pictures."""

    @property
    def device(self) -> torch.device: ...
    def make(self, shape: torch.Size) -> Pass: ...
    def profile(self, x_nchw: Tensor) -> list[Recorder]: ...


class _Captured(NamedTuple):
    picture: Tensor
    logits: Tensor
    replay: Replay
    kept: Pass  # owns what the replay reads and writes


class GraphExecutor:
    """Replays the passes of `source`. Not for several threads at once: the engine makes their calls take turns.

    Calls may come from different CUDA streams: a call waits, on the device, for the one before it.
    """

    def __init__(self, name: str, source: Source, capture: Callable[[Pass], Replay] | None = None) -> None:
        self.name, self.source = name, source
        self._capture = capture or capture_pass
        on_gpu = source.device.type == "cuda"
        # a graph that is dropped may still be running, and its buffers would be handed to somebody else
        self._shapes: Shapes[torch.Size, _Captured] = Shapes(
            self._make, (lambda: torch.cuda.synchronize(source.device)) if on_gpu else lambda: None
        )
        self._last: torch.cuda.Stream | None = None

    def __call__(self, x_nchw: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits, fp32: a copy, or `out`, filled. Pictures must lie on the source's device.

        Nothing is copied for arguments that are themselves the buffers which `buffers` gives.
        """
        if x_nchw.device != self.source.device:
            raise ParNetError(
                f"pictures on {x_nchw.device}: executor {self.name} takes them on {self.source.device} alone"
            )
        captured = self._shapes(x_nchw.shape)
        with torch.inference_mode():
            self._follow()
            if x_nchw is not captured.picture:
                captured.picture.copy_(x_nchw)
            captured.replay()
            if out is None:
                return captured.logits.clone()
            if out is not captured.logits:
                out.copy_(captured.logits)
            return out

    def buffers(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Pictures and logits of the graph for this shape, which every call with this shape overwrites."""
        captured = self._shapes(shape)
        return captured.picture, captured.logits

    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """One pass that is not a graph: the spans of each lane."""
        return self.source.profile(x_nchw)

    def close(self, status: int = 0) -> None:
        """Nothing to release."""

    def _make(self, shape: torch.Size) -> _Captured:
        made = self.source.make(shape)
        return _Captured(made.picture, made.logits, self._capture(made), made)

    def _follow(self) -> None:
        """Let the current CUDA stream wait for the one that the last call used."""
        if self.source.device.type == "cuda":
            current = torch.cuda.current_stream(self.source.device)
            if self._last is not None and self._last != current:
                current.wait_stream(self._last)
            self._last = current


def capture_pass(made: Pass) -> Replay:
    """A pass as a CUDA graph on its own device."""
    with torch.cuda.device_of(made.picture), torch.inference_mode():
        return capture(made.launch).replay


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`work` as a CUDA graph, after two runs that load and compile what it needs.

    Other threads may use the GPU meanwhile: in the default mode, one of their unsafe calls would break the capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph
