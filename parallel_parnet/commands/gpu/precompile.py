"""Fill Triton's cache from all cores at once: the checks on a GPU then find every kernel compiled.

Compiling needs no GPU, only the GPU's architecture: the kernels are the same, down to their key in the cache. So are
the launchers in C that Triton up to 3.6 makes for each signature, at a third of a second of the C compiler.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from triton.backends.nvidia import driver

from parallel_parnet import Program, fold
from parallel_parnet.cores import cores
from parallel_parnet.executors.triton_backend import whole
from parallel_parnet.int8.e4m3 import in_fp8
from parallel_parnet.int8.kernels import input_features, quantisable_operations
from parallel_parnet.kernels.gpu.compiled import stand_in
from parallel_parnet.kernels.gpu.config import HALF, Table, bindings
from parallel_parnet.kernels.gpu.convolution import E4M3, Convolution
from parallel_parnet.kernels.gpu.geometry import Tile
from parallel_parnet.kernels.gpu.launch import Launch
from parallel_parnet.kernels.gpu.level import level
from parallel_parnet.kernels.gpu.samples import GATED, KINDS, convolution, geometry, without_values
from parallel_parnet.program.pixels import fold_pixels

from ..processes import end_with_parent
from .scope import DTYPE, Scope, model

BESIDE_FP8 = DTYPE  # of gates, of the picture's convolution and of the classifier
TILES = (Tile(64, 64, 64), Tile(64, 32, 32, split_k=3))
SIDE, CHANNELS, PICTURES = 19, 92, 3  # awkward on purpose: ragged tiles in every direction


class Target(NamedTuple):
    """What is compiled for. gpu: whose table is taken. launchers: whether to build them, which takes libcuda.
    multiprocessors: of the GPU; 0 for as many as its family's has."""

    capability: tuple[int, int]
    gpu: str = ""
    launchers: bool = True
    multiprocessors: int = 0


Job = Callable[[Target], object]


@dataclass(frozen=True)
class KernelCase:
    """One random convolution of a kind."""

    kind: str
    dtype: torch.dtype
    tile: Tile

    def make(self, seed: int, device: torch.device | str) -> Convolution:
        """Its operands; fp32 has no tensor cores to feed, and takes narrower steps."""
        tile = replace(self.tile, bk=32) if self.dtype == torch.float32 else self.tile
        shape = geometry(self.kind, SIDE, SIDE, CHANNELS)
        return convolution(shape, tile, PICTURES, self.dtype, seed, device=device)

    def launch(self, conv: Convolution) -> Launch:
        return level([conv], num_warps=4, num_stages=3)

    def offline(self, target: Target) -> list[Launch]:
        return [self.launch(without_values(self.make(0, "cpu")))]


@dataclass(frozen=True)
class NetworkCase:
    """All launches of a variant, or, for the sake of many cores, the one at `index`. dtype: e4m3 for fp8. raw: of
    pictures in uint8."""

    variant: str
    dtype: torch.dtype
    n: int
    index: int | None = None
    raw: bool = False

    def offline(self, target: Target) -> list[Launch]:
        narrow = self.dtype == E4M3
        plain = shapes_of(self.variant)
        if self.raw:  # folding the pictures' scale and shift into the weights needs values
            plain = fold_pixels(fold(model(self.variant).eval()), self.dtype)
        program, dtype = (shapes_in_fp8(plain), BESIDE_FP8) if narrow else (plain, self.dtype)
        side = program.config.image_size
        table = Table.load(target.capability, target.gpu, bindings(), target.multiprocessors)
        launches = whole(program, (self.n, side, side), dtype, torch.device("meta"), table, self.raw).launches
        chosen = launches if self.index is None else launches[self.index : self.index + 1]
        return [launch for launch in chosen if isinstance(launch, Launch)]


@cache
def shapes_of(variant: str) -> Program:
    """A program without values."""
    with torch.device("meta"):
        made = model(variant).eval()
    return fold(made)


def shapes_in_fp8(program: Program) -> Program:
    """A program without values, quantised to fp8."""
    names = input_features(quantisable_operations(program))
    return in_fp8(program, {name: torch.ones(program.by_name[name].cout, device="meta") for name in names})


def kernel_cases(scope: Scope) -> list[KernelCase]:
    """Every kind of convolution, in every type and tile."""
    return [KernelCase(*case) for case in product(KINDS, (*HALF, torch.float32), TILES)][: scope.kernels]


def fp8_cases(scope: Scope) -> list[KernelCase | NetworkCase]:
    """Every gated convolution in fp8, in every tile, and the launches of the networks that decide."""
    kernels = [KernelCase(*case) for case in product(GATED, (E4M3,), TILES)][: scope.kernels]
    return [*kernels, *single_launches([NetworkCase(variant, E4M3, 1) for variant in scope.decisive])]


def network_cases(scope: Scope) -> list[NetworkCase]:
    """Of the full parity: half precision and batch 1 first; more pictures in one type, since each batch is compiled."""
    several = [(scope.dtypes[0], n) for n in scope.batches[1:]]
    kinds = [*((dtype, scope.batches[0]) for dtype in scope.dtypes), *several]
    return [NetworkCase(variant, dtype, n) for dtype, n in kinds for variant in scope.variants]


def raw_cases(scope: Scope) -> list[NetworkCase]:
    """The first level for pictures in uint8, of the networks that the executors' step gives such."""
    halves = [dtype for dtype in scope.dtypes if dtype != torch.float32]
    return [NetworkCase(variant, dtype, 1, 0, raw=True) for variant, dtype in product(scope.used, halves)]


def single_launches(cases: Sequence[NetworkCase]) -> list[NetworkCase]:
    """Each case as one case for each of its launches."""
    return [replace(case, index=i) for case in cases for i in range(shapes_of(case.variant).launches)]


def jobs_of(cases: Iterable[KernelCase | NetworkCase]) -> dict[str, Job]:
    """What compiles each case, by its name."""
    return {str(case): partial(compile_case, case) for case in cases}


def compile_case(case: KernelCase | NetworkCase, target: Target) -> None:
    """All that a case launches."""
    for launch in case.offline(target):
        compile_launch(launch, target)


def compile_launch(launch: Launch, target: Target) -> Any:
    """The compiled kernel of a launch, in Triton's cache, and its launcher."""
    with stand_in(target.capability):
        compiled = launch.compile()
    if target.launchers:
        build_launcher(compiled)
    return compiled


def build_launcher(compiled: Any) -> bool:
    """Build what Triton would build at the first launch; whether this Triton builds anything. From 3.7 on one launcher
    serves all signatures."""
    if not hasattr(driver, "make_launcher"):
        return False
    driver.CudaLauncher(compiled.src, compiled.metadata)
    return True


def compile_all(jobs: Mapping[str, Job], target: Target, deadline: float) -> dict[str, object]:
    """Run jobs on every core until the deadline (`time.monotonic`); what fails is named with its reason."""
    done, failed, started = 0, {}, time.monotonic()
    pool = worker_pool()
    with compiling():
        futures: dict[Future, str] = {pool.submit(job, target): name for name, job in jobs.items()}
    try:
        for future in as_completed(futures, timeout=max(0.0, deadline - time.monotonic())):
            if (error := future.exception()) is None:
                done += 1
            else:
                failed[futures[future]] = f"{type(error).__name__}: {error}"
    except TimeoutError:
        pass  # what is left out is counted below, and compiled when it is needed
    pool.shutdown(wait=False, cancel_futures=True)
    return {
        "passed": not failed,
        "compiled": done,
        "left_out": len(jobs) - done - len(failed),
        "failed": failed,
        "cores": cores(),
        "compile_s": round(time.monotonic() - started, 1),
    }


def worker_pool() -> ProcessPoolExecutor:
    """A process for each core, started afresh, since a process that has used a GPU must not be forked."""
    return ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn"), _start, (os.getpid(),))


@contextmanager
def compiling() -> Iterator[None]:
    """Processes that are started within compile kernels, also where this one interprets them: Triton decides when it is
    imported."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def _start(parent: int) -> None:
    torch.set_num_threads(1)
    end_with_parent(parent)
