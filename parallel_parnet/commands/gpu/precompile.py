"""Fill Triton's cache from all cores at once: the checks on a GPU then find every kernel compiled.

Compiling needs no GPU, only the GPU's architecture: the kernels are the same, down to their key in the cache.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch

from parallel_parnet import Program, create_model, fold
from parallel_parnet.executors.triton_backend import whole
from parallel_parnet.kernels.gpu.compiled import stand_in
from parallel_parnet.kernels.gpu.config import Table
from parallel_parnet.kernels.gpu.convolution import Convolution
from parallel_parnet.kernels.gpu.geometry import Tile
from parallel_parnet.kernels.gpu.launch import Launch
from parallel_parnet.kernels.gpu.level import level
from parallel_parnet.kernels.gpu.samples import KINDS, convolution, geometry, without_values

VARIANTS = ("parnet_s", "parnet_m", "parnet_l", "parnet_xl", "parnet_cifar_1m", "parnet_fashion")
BATCHES = (1, 4)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # fp32 last: it takes longest and is timed nowhere
TILES = (Tile(64, 64, 64), Tile(64, 32, 32, split_k=3))
SIDE, CHANNELS, PICTURES = 19, 92, 3  # awkward on purpose: ragged tiles in every direction


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

    def offline(self) -> list[Launch]:
        return [self.launch(without_values(self.make(0, "cpu")))]


@dataclass(frozen=True)
class NetworkCase:
    """All launches of a variant, or, for the sake of many cores, the one at `index`."""

    variant: str
    dtype: torch.dtype
    n: int
    index: int | None = None

    def offline(self, capability: tuple[int, int], gpu: str) -> list[Launch]:
        program = shapes_of(self.variant)
        side = program.config.image_size
        table = Table.load(capability, gpu)
        launches = whole(program, (self.n, side, side), self.dtype, torch.device("meta"), table).launches
        return launches if self.index is None else launches[self.index : self.index + 1]


@cache
def shapes_of(variant: str) -> Program:
    """A program without values."""
    with torch.device("meta"):
        model = create_model(variant).eval()
    return fold(model)


def kernel_cases() -> list[KernelCase]:
    return [KernelCase(*case) for case in product(KINDS, DTYPES, TILES)]


def network_cases() -> list[NetworkCase]:
    return [NetworkCase(variant, dtype, n) for dtype, n, variant in product(DTYPES, BATCHES, VARIANTS)]


def single_launches(cases: list[NetworkCase]) -> list[NetworkCase]:
    """The same cases, launch by launch."""
    return [replace(case, index=i) for case in cases for i in range(shapes_of(case.variant).launches)]


def compile_case(case: KernelCase | NetworkCase, capability: tuple[int, int], gpu: str) -> int:
    """Compile what a case launches, and say how many launches that was."""
    launches = case.offline() if isinstance(case, KernelCase) else case.offline(capability, gpu)
    with stand_in(capability):
        for launch in launches:
            launch.compile()
    return len(launches)


def compile_all(
    cases: list[KernelCase | NetworkCase], capability: tuple[int, int], gpu: str, deadline: float
) -> dict[str, object]:
    """Compile on every core until the deadline (`time.monotonic`); a case that fails is named with its reason."""
    done, failed = 0, {}
    pool = worker_pool()
    futures: dict[Future[int], KernelCase | NetworkCase] = {
        pool.submit(compile_case, case, capability, gpu): case for case in cases
    }
    try:
        for future in as_completed(futures, timeout=max(0.0, deadline - time.monotonic())):
            if (error := future.exception()) is None:
                done += 1
            else:
                failed[str(futures[future])] = f"{type(error).__name__}: {error}"
    except TimeoutError:
        pass  # what is left out is counted below, and compiled when it is needed
    pool.shutdown(wait=False, cancel_futures=True)
    left_out = len(cases) - done - len(failed)
    return {"passed": not failed, "compiled": done, "left_out": left_out, "failed": failed, "cores": _cores()}


def worker_pool() -> ProcessPoolExecutor:
    """A process for each core, started afresh, since a process that has used a GPU must not be forked."""
    return ProcessPoolExecutor(_cores(), multiprocessing.get_context("spawn"), _one_thread)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _one_thread() -> None:
    torch.set_num_threads(1)
