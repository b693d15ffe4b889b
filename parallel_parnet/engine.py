"""The engine: a program, a placement, and the executor that runs one under the other."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import health
from .errors import ParNetError
from .executors.backends import BACKENDS, arithmetic, has_openvino
from .executors.distributed import DistributedExecutor
from .executors.local import LocalExecutor
from .placement import Placement
from .profiling.clocks import Clock
from .profiling.spans import Recorder
from .program import Program, check_input

if TYPE_CHECKING:
    from .executors.grouped import GroupedExecutor

EXECUTORS = ("auto", "cpu", "reference", *BACKENDS, "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Engine:
    """Runs a program: `Engine(fold(model))(pictures)` gives logits.

    placement: which lane runs what; one lane, or one lane per rank, where not given.
    device: "cuda" where there is one, else "cpu". Lanes of one process take the visible GPUs in turn.
    dtype: float32, bfloat16 or (on GPUs) float16.
    executor: "auto" takes OpenVINO on the CPU where it is installed, else eager mode; "cpu" is the same and insists on
        the CPU; "reference" is the plain fp32 oracle; "eager", "inductor" and "openvino" are what they say;
        "triton" is one kernel launch per level, on one NVIDIA GPU.

    transport: how features travel between ranks, one of `TRANSPORTS`.

    Between `join_ranks` and `leave_ranks` each rank is a lane: the coordinator's rank calls the engine, all others call
    `serve`. Close it, or use it as a context manager, to end them. A placement of one lane stays in its process.
    """

    def __init__(
        self,
        program: Program,
        placement: Placement | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        executor: str = "auto",
        transport: str = "auto",
    ) -> None:
        monitor = health.current()
        ranks = monitor.world if monitor and (placement is None or placement.lanes > 1) else 1
        self.program, self.dtype = program, dtype
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() and executor != "cpu" else "cpu"))
        backend = _choose(executor, self.device, dtype)
        if placement is None:
            k = -(-program.streams // ranks)
            placement = Placement.from_streams_per_gpu(program, k, ranks) if ranks > 1 else Placement.single(program)
        placement.check(program)
        self.placement = placement
        self.lane = 0
        self._executor: LocalExecutor | DistributedExecutor | GroupedExecutor
        if backend == "triton":
            from .executors.grouped import GroupedExecutor  # here, since triton is only installed on Linux

            if placement.lanes > 1:
                raise ParNetError(f"executor triton runs all streams in one launch: not on {placement.lanes} lanes")
            self._executor = GroupedExecutor(program, self.device, dtype)
        elif ranks > 1:
            if placement.lanes != ranks:
                raise ParNetError(f"placement of {placement.lanes} lanes on {ranks} ranks: they must be as many")
            assert monitor is not None, "several ranks have joined"
            self.lane = monitor.rank
            self._executor = DistributedExecutor(
                program, placement, monitor.rank, transport, self.device, dtype, backend
            )
        else:
            devices = [self.lane_device(lane) for lane in range(placement.lanes)]
            self._executor = LocalExecutor(program, placement, devices, dtype, backend)

    @property
    def executor(self) -> str:
        """The name of the path that runs, as chosen."""
        return self._executor.name

    def lane_device(self, lane: int) -> torch.device:
        """Where a lane of this process runs: the visible GPUs in turn, unless the engine was given one of them."""
        if self.device.type == "cpu" or self.device.index is not None:
            return self.device
        return torch.device("cuda", lane % torch.cuda.device_count())

    @property
    def arithmetic(self) -> torch.dtype:
        """The type that convolutions are computed in, which may be wider than `dtype` where the device lacks it."""
        return arithmetic(self.executor, self.dtype)

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank calls the engine; the others serve."""
        return self.lane == self.placement.coordinator

    def __call__(self, x_nchw: Tensor) -> Tensor:
        """Normalised pictures [N, 3, H, W] to logits fp32 [N, classes], on the same device.

        H and W are multiples of `program.size_multiple`. Raises ParNetError for any other input.
        """
        check_input(self.program, x_nchw)
        return self._executor(x_nchw)

    def map(self, pictures: Iterable[Tensor]) -> Generator[Tensor]:
        """Logits for each of many inputs, in order, as calls one by one would give them.

        With several ranks the next input is on its way while the last is computed, so that ranks do not idle in
        between; inputs are taken at most two ahead of the answers. Shapes may differ. Until the iterator ends, or is
        closed, the engine takes no other calls.
        """
        executor, checked = self._executor, (self._checked(x_nchw) for x_nchw in pictures)
        if isinstance(executor, DistributedExecutor):
            return executor.map(checked)
        return (executor(x_nchw) for x_nchw in checked)

    def _checked(self, x_nchw: Tensor) -> Tensor:
        check_input(self.program, x_nchw)
        return x_nchw

    def serve(self) -> int:
        """On every rank but the coordinator's: take part in requests until it closes; returns its exit status."""
        assert isinstance(self._executor, DistributedExecutor), "only ranks beside the coordinator's serve"
        return self._executor.serve()

    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """One eager pass, operation by operation: the spans of each lane, waits for other lanes included."""
        check_input(self.program, x_nchw)
        return self._executor.profile(x_nchw)

    def trace(self, x_nchw: Tensor) -> list[Recorder]:
        """A few requests as calls run them: the spans of each lane, and what its GPU ran."""
        check_input(self.program, x_nchw)
        return self._executor.trace(x_nchw)

    def clocks(self) -> list[Clock]:
        """Each lane's clock against the coordinator's."""
        if isinstance(self._executor, DistributedExecutor):
            return self._executor.clocks()
        return [Clock()] * self.placement.lanes

    def close(self, status: int = 0) -> None:
        """End the other ranks' `serve` with this status. Does nothing on them, or in one process."""
        if self.is_coordinator:
            self._executor.close(status)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close()
        elif isinstance(error, ParNetError):
            self.close(status=2)


def _choose(executor: str, device: torch.device, dtype: torch.dtype) -> str:
    if executor not in EXECUTORS:
        raise ParNetError(f"unknown executor {executor!r}: choose one of {', '.join(EXECUTORS)}")
    if dtype not in DTYPES:
        raise ParNetError(f"dtype {dtype}: choose float32, bfloat16 or float16")
    if device.type not in ("cpu", "cuda"):
        raise ParNetError(f"device {device}: choose cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ParNetError(f"device {device}: torch sees no NVIDIA GPU here; choose cpu")
    if device.type == "cpu" and dtype == torch.float16:
        raise ParNetError("float16 on the CPU: choose float32 or bfloat16")
    if executor == "reference" and dtype != torch.float32:
        raise ParNetError("executor reference is the fp32 oracle: leave dtype at float32")
    if device.type == "cpu" and executor == "triton":
        raise ParNetError("executor triton runs on NVIDIA GPUs only: choose eager")
    if device.type == "cuda" and executor in ("cpu", "openvino"):
        raise ParNetError(f"executor {executor} runs on the CPU only: choose device cpu")
    if executor in ("auto", "cpu"):
        return "openvino" if device.type == "cpu" and has_openvino() else "eager"
    if executor == "openvino" and not has_openvino():
        raise ParNetError("executor openvino: not installed here; pip install openvino, or choose eager")
    return executor
