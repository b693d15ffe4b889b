"""The engine: a program, a placement, and the executor that runs one under the other."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .choice import ENOUGH, Choice, default_placement, on_gpus, on_one_lane, timed
from .cores import check_threads, usual_threads
from .errors import ParNetError, warn
from .executors.answers import Answer, check_out, copied, each, fill
from .executors.available import METHODS, choose_executor, find_device, for_cpu, notes
from .executors.backends import arithmetic, broken_openvino, refuse_recorders
from .executors.binding import refuse_without_memory
from .executors.distributed import DistributedExecutor
from .executors.graph import GraphExecutor
from .executors.local import LocalExecutor, synchronise
from .executors.making import Executor, make_backend, make_executor
from .executors.whole import Repeat, WholeExecutor
from .gpu import gpu_and_versions, lives_on_gpu
from .profiling.clocks import Clock
from .profiling.ranges import Ranges
from .profiling.spans import REQUEST, Recorder, Spans, span
from .profiling.traced import traced
from .program.inputs import check_input, kind_of
from .program.placement import Placement
from .program.program import Program
from .proof import prove, prove_on_all_ranks
from .saved import ON_THE_CPU, Saved
from .settings import outside_torch_modes, with_own_settings
from .transport import TRANSPORTS, agree, health
from .turns import Turns

BRIEFLY = 0.05  # seconds of measuring where a first call waits for it


class Engine:
    """Runs a program: `Engine(fold(model))(pictures)` gives logits, or the outputs that `fold` was asked for.

    program: what `fold` returns, or `Program.load`.
    placement: which lane runs what; without it one lane, or one lane per rank.
    device: "cpu", "cuda", or a GPU's number; without it "cuda" where there is one. Lanes of one process take the
        visible GPUs in turn, each with a CUDA stream of its own.
    dtype: float32, bfloat16 or (on GPUs) float16. A quantised program takes float32, the type of all that is not int8;
        one in fp8 takes any of them, for triton and cuda_graph.
    executor: "auto" takes, on the CPU, "native" (our own kernels), else "openvino", for a quantised program "native" or
        "eager"; on a GPU, at `warm_up` or at the first call, the fastest that agrees with the reference there. Or one
        of "reference", "eager", "inductor", "native", "openvino", "triton", "cuda_graph" and "cuda_streams":
        docs/architecture.md says what each does, and which programs it takes.
    transport: how features travel between ranks, one of `TRANSPORTS`.
    threads: compute threads of each lane, for native and OpenVINO; without it torch's number, or the number of cores
        that the process may use, where that is smaller.

    The attribute `notes` lists what "auto" had to pass over, and why; each line is also a ParNetWarning, once a
    process. The constructor raises ParNetError where the arguments do not fit each other, the program or the machine.

    Calls from several threads take turns: there is one set of buffers. A call within a call of the same thread, as by a
    signal handler, is refused. Work on a GPU goes to the caller's current CUDA stream; a call from another CUDA stream
    waits there for the call before it.

    Between `join_ranks` and `leave_ranks` each rank is a lane: the coordinator's rank calls the engine, all others call
    `serve`. Close it, or use it as a context manager, to end them. After an exception in the middle of a call it can
    only be closed: what ranks had on its way would mix with the next. A placement of one lane stays in its process.
    """

    @with_own_settings
    def __init__(
        self,
        program: Program,
        placement: Placement | None = None,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        executor: str = "auto",
        transport: str = "auto",
        threads: int | None = None,
    ) -> None:
        if not isinstance(program, Program):
            raise ParNetError(f"an engine runs a program, and this is a {type(program).__name__}: Engine(fold(model))")
        program.check_values()
        if not isinstance(placement, Placement | None):
            raise ParNetError(f"placement {placement!r}: give a Placement, as Placement.by_streams makes one")
        if transport not in TRANSPORTS:
            raise ParNetError(f"unknown transport {transport!r}: choose one of {', '.join(TRANSPORTS)}")
        monitor = health.current()
        ranks = monitor.world if monitor and (placement is None or placement.lanes > 1) else 1
        self.program, self.dtype, self.threads, self._asked = program, dtype, threads, executor
        self.device = find_device(device)
        self.executor = choose_executor(executor, self.device, dtype, program.quantised)
        self.notes = notes(executor, self.executor, self.device, program.quantised)
        for note in self.notes:
            warn(note)
        check_threads(threads, self.device)
        self._given = placement is not None
        # what nobody asked for, `warm_up` may choose
        self._open = placement is None and threads is None and ranks == 1 and executor == "auto"
        self._unproved = executor == "auto" and lives_on_gpu(self.device) and not program.quantised
        self._cores: int | None = None  # that a choice was measured on
        self.placement = placement or default_placement(program, self.executor, ranks)
        self.placement.check(program)
        self.lane, self._turn, self._ranges = 0, Turns(), Ranges.of(program)
        self._checked: tuple[object, ...] | None = None  # kind of input
        self._repeat: Repeat | None = None  # for pictures like the last
        self._executors: dict[bool, Executor] = {}  # for normalised and for raw pictures, made when first needed
        self._distributed: DistributedExecutor | None = None
        self._last: torch.cuda.Stream | None = None  # in which a call was made
        one_gpu = self.placement.lanes == 1 or ranks > 1 or executor == "cuda_streams"
        if self.device.type == "cuda" and self.device.index is None and one_gpu:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if monitor is not None and ranks > 1:
            self._take_lane(monitor.rank, ranks, transport)

    def _take_lane(self, rank: int, ranks: int, transport: str) -> None:
        """Agree with the other ranks on what runs, and become one of them."""
        if self.placement.lanes != ranks:
            raise ParNetError(f"placement of {self.placement.lanes} lanes on {ranks} ranks: they must be as many")
        runs = "auto" if self._unproved else self.executor
        # first, since what else ranks compare before a request depends on it
        agree({"executor": f"{runs} in {self.dtype} on {self.device.type}"})
        self.lane = rank
        if self._unproved:
            made = prove_on_all_ranks(self.program, self._made, self.device, self.dtype, self._synchronise)
            self.executor, self.notes = made
            self._unproved = False
            for note in self.notes:
                warn(note)
        backend = partial(
            make_backend, self.executor, self.program,
            devices=[self.device] * ranks, dtype=self.dtype, threads=self.threads,
        )  # fmt: skip
        self._distributed = DistributedExecutor(
            self.program, self.placement, rank, transport, self.device, backend, METHODS[self.executor].captured
        )
        self._executors[False] = self._executors[True] = self._distributed

    @classmethod
    @with_own_settings
    def load(cls, path: Path | str, device: str | int | torch.device | None = None) -> Engine:
        """Make the engine that `save` wrote. ParNetError with the file's name where it is damaged or does not fit here.

        What was measured on another kind of device, with another number of threads, or by an executor that is not
        here, is left out: `warm_up` measures again, under the placement that the engine was given, if it was.
        """
        program, metadata = Program.read(path)
        try:
            saved = Saved.of(metadata, program)
            if saved.executor == ON_THE_CPU:
                saved, device = replace(saved, executor="auto"), "cpu" if device is None else device
            wanted = find_device(device)
            holds = saved.holds_on(wanted, program)
            engine = cls(
                program, saved.placement if holds or saved.given else None, wanted, saved.dtype, saved.executor,
                threads=saved.threads if holds else None,
            )  # fmt: skip
            engine._given = saved.given
            if holds and saved.was_measured:
                engine.executor = choose_executor(saved.chosen, engine.device, saved.dtype, program.quantised)
                engine._unproved, engine._cores = False, saved.cores
        except ParNetError as error:
            raise ParNetError(f"{path}: {error}") from None
        return engine

    @with_own_settings
    def save(self, path: Path | str) -> None:
        """Write program, placement, type, executor and what `warm_up` chose to a .safetensors file, atomically."""
        placement = None if self._open else self.placement
        proved = self._asked == "auto" and lives_on_gpu(self.device) and not self._unproved
        gpu = gpu_and_versions(self.device) if proved else None
        saved = Saved(self.dtype, self._asked, self.executor, placement, self.threads, self._cores, gpu, self._given)
        self.program.save(path, {"engine": saved.text()})

    def lane_device(self, lane: int) -> torch.device:
        """Return the device of a lane of this process: the visible GPUs in turn, unless the engine was given one."""
        if self.device.type == "cpu" or self.device.index is not None:
            return self.device
        return torch.device("cuda", lane % torch.cuda.device_count())

    @property
    def _devices(self) -> list[torch.device]:
        return [self.lane_device(lane) for lane in range(self.placement.lanes)]

    @property
    def arithmetic(self) -> torch.dtype:
        """The type that convolutions are computed in: that of a quantised program's weights, else `dtype`, or a wider
        one where the device lacks that."""
        return arithmetic(self.executor, self.dtype, self.program.quantised)

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank calls the engine; the others serve."""
        return self.lane == self.placement.coordinator

    def __call__(self, x_nchw: Tensor, out: Tensor | None = None) -> Answer:
        """Return logits fp32 [N, classes] for pictures [N, 3, H, W], on the same device.

        For a program with outputs, return a dictionary of them by name: features fp32 [N, C, H, W], in whatever memory
        format the executor has. Pictures are float32, bfloat16 or float16, normalised, or uint8, RGB, as they are. H
        and W are multiples of `program.size_multiple`. What the last eight shapes need is kept; of more, in turn, each
        is made anew. The logits are a tensor of their own, or `out`, filled. ParNetError for any other input or `out`.
        """
        if not is_dynamo_compiling() and out is None and (repeat := self._repeat) and repeat.takes(x_nchw):
            with self._turn():
                return repeat(x_nchw)
        return self._call(x_nchw, out)

    @with_own_settings
    def _call(self, x_nchw: Tensor, out: Tensor | None) -> Answer:
        if self._unproved:
            check_input(self.program, x_nchw)
            self._prove(x_nchw, BRIEFLY)
        with self._turn(), span(self._ranges, REQUEST):
            before = self._checked
            executor = self._ready(x_nchw)
            if out is not None:
                check_out(self.program, x_nchw, out)
            if isinstance(executor, GraphExecutor):
                return executor(x_nchw, out)
            answer = executor(x_nchw)
            if isinstance(executor, WholeExecutor) and self._repeat is None and before is self._checked:
                self._repeat = executor.repeat(x_nchw)
            if out is not None:
                return fill(out, answer)
            # what an executor gives is its own, or an inference tensor, which nobody could change or train with
            return each(answer, copied if isinstance(executor, WholeExecutor) else Tensor.clone)

    def map(self, pictures: Iterable[Tensor]) -> Generator[Answer]:
        """Return an iterator over the answers to many inputs, in order, as calls one by one would give them.

        With several ranks the next input is on its way while the last is computed, so that ranks do not idle in
        between; inputs are taken at most two ahead of the answers, and may be overwritten once the next is asked for.
        Shapes may differ. Until the iterator ends, or is closed, an engine of several ranks takes no other calls.
        """
        if self._distributed is not None:
            self._turn.check()
            return self._distributed.map(self._taken_in(x_nchw) for x_nchw in pictures)
        return (self(x_nchw) for x_nchw in pictures)

    @with_own_settings
    def buffers(self, x_nchw: Tensor) -> tuple[Tensor, Tensor]:
        """Return, for executors of CUDA graphs, pictures and logits of the graph for pictures of such a shape and type.

        Fill the first and give both to the engine, and nothing is copied: `engine(pictures, out=logits)`. Any other
        call with pictures of this shape overwrites them.
        """
        with self._turn():
            executor = self._ready(x_nchw)
            if not isinstance(executor, GraphExecutor):
                raise ParNetError(f"executor {self.executor} has no buffers to share: choose cuda_graph")
            return executor.buffers(x_nchw.shape)

    @with_own_settings
    def warm_up(self, x_nchw: Tensor) -> dict[str, float]:
        """Compile for pictures like these; where nobody chose, choose executor and placement by measuring.

        Returns the median seconds of what was compared, by name, the chosen one's first; nothing where there was no
        choice. On a GPU, `notes` then says what did not run or did not agree with the reference. `save` keeps the
        choice.
        """
        if self._unproved:
            return self._prove(x_nchw, ENOUGH)
        executors = for_cpu(self.dtype, self.program.quantised) if self._open and self.device.type == "cpu" else []
        if not executors:
            self(x_nchw)
            return {}
        if "openvino" in executors and (reason := broken_openvino()):
            executors.remove("openvino")
            self.notes = [*self.notes, f"left out: {reason}"]
            warn(self.notes[-1])
        cores = usual_threads()
        tried = timed(on_one_lane(self.program, cores, executors), self._made, x_nchw)
        with self._turn():
            self._take(*tried[0][1:])
            self._cores = cores
        return {str(choice): seconds for seconds, choice, _ in tried}

    def _made(self, choice: Choice, dtype: torch.dtype | None) -> Engine:
        dtype = dtype or self.dtype
        return Engine(self.program, choice.placement, self.device, dtype, choice.executor, threads=choice.threads)

    def _take(self, choice: Choice, engine: object) -> None:
        assert isinstance(engine, Engine)
        self.executor, self.placement, self.threads = choice.executor, choice.placement, choice.threads
        self._executors, self.device, self._open, self._unproved = engine._executors, engine.device, False, False
        self._repeat = None

    def _prove(self, x_nchw: Tensor, seconds: float) -> dict[str, float]:
        """What `warm_up` does on a GPU, in so many seconds of measuring; nothing where another thread has done it."""
        with self._turn():
            if not self._unproved:
                return {}
            choices = on_gpus(self.program, None if self._open else self.placement)
            tried, self.notes = prove(self.program, choices, self._made, x_nchw, self.dtype, self._synchronise, seconds)
            self._take(*tried[0][1:])
        for note in self.notes:
            warn(note)
        return {str(choice): seconds for seconds, choice, _ in tried}

    @with_own_settings
    def serve(self) -> int:
        """Take part in requests, on every rank but the coordinator's, until that closes; return its exit status."""
        if self._distributed is None:
            raise ParNetError("one process has nobody to serve: call the engine, or join_ranks before it is made")
        self._turn.check()
        return self._distributed.serve()

    @with_own_settings
    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run one pass operation by operation: a recorder of spans for each lane, waits for other lanes included.

        Spans are those of the kernels of native and Triton, for other executors of torch's operations in eager mode.
        """
        with self._turn():
            return self._ready(x_nchw).profile(x_nchw)

    def _taken_in(self, x_nchw: Tensor) -> Tensor:
        """Check pictures, and let the current CUDA stream wait for that of the last call."""
        if not isinstance(x_nchw, Tensor) or x_nchw.is_nested or kind_of(x_nchw) != self._checked or x_nchw.is_neg():
            check_input(self.program, x_nchw)
            if x_nchw.is_meta:
                raise ParNetError("a picture on meta, which has no memory: give it on the CPU or a GPU")
            self._checked, self._repeat = kind_of(x_nchw), None
        refuse_without_memory(x_nchw)
        refuse_recorders(self.executor)
        # a capture orders by itself
        if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            current = torch.cuda.current_stream(self.lane_device(self.placement.coordinator))
            if self._last is not None and self._last != current:
                current.wait_stream(self._last)
            self._last = current
        return x_nchw

    def _ready(self, x_nchw: Tensor) -> Executor:
        """Return the executor for such pictures, made when it is first needed."""
        raw = self._taken_in(x_nchw).dtype == torch.uint8
        executor = self._executors.get(raw)
        if executor is None:
            executor = self._executors[raw] = self._make_executor(raw)
        return executor

    @outside_torch_modes
    def _make_executor(self, raw: bool) -> Executor:
        return make_executor(self.executor, self.program, self.placement, self._devices, self.dtype, self.threads, raw)

    @with_own_settings
    def trace(self, x_nchw: Tensor) -> list[Recorder]:
        """Run a few requests as calls run them: a recorder for each lane, of its spans and of what its GPU ran.

        In one process all spans are on the coordinator's lane, since one thread launches the work of all lanes.
        """
        with self._turn():
            executor = self._ready(x_nchw)
            if self._distributed is not None:
                return self._distributed.trace(x_nchw)
            whole = ", ".join(dict.fromkeys(op.label for op in self.program.operations))

            def request(spans: Spans) -> None:
                if isinstance(executor, LocalExecutor):
                    executor.run(x_nchw, spans)
                else:
                    with spans.span(whole):
                        executor(x_nchw)

            recorder = traced(request, self.device, self._synchronise, self._ranges)
            return [recorder if lane == self.lane else Recorder() for lane in range(self.placement.lanes)]

    @with_own_settings
    def clocks(self) -> list[Clock]:
        """Measure each lane's clock against the coordinator's."""
        self._turn.check()
        return self._distributed.clocks() if self._distributed else [Clock()] * self.placement.lanes

    def _synchronise(self) -> None:
        synchronise(self._devices)

    @with_own_settings
    def close(self, status: int = 0) -> None:
        """End the other ranks' `serve` with this status. Does nothing on them, in one process, or in a fork."""
        if self._distributed is not None and self.is_coordinator and not self._turn.is_forked:
            self._distributed.close(status)

    def __reduce__(self) -> NoReturn:
        raise ParNetError(
            "an engine holds buffers and threads, which cannot be copied or pickled: keep it with Engine.save and "
            "Engine.load, or make another with Engine(engine.program)"
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, ParNetError):
            self.close(status=0 if error is None else 2)
