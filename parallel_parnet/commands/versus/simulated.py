"""What the planner makes of a network on several lanes, each of which runs one operation at a time."""

from __future__ import annotations

import torch

from parallel_parnet import Program
from parallel_parnet.planning.costs import H200, LINKS, Costs, Device, Link, Measured
from parallel_parnet.planning.search import search

from ..plan.measured import on_a_thread

HAND_OVER = 50e-6  # seconds until another lane's thread goes on; a feature is not copied
LANES = (2, 3)  # ParNet has three streams
PASSES = 3
SHARED = Link("shared memory", HAND_OVER, float("inf"), "a hand-over between threads; nothing is copied")
WHAT = (
    "Ratios are ParNet's latency over the other's. All threads share every operation, which speeds up any network. "
    "Simulated lanes are cores like this machine's "
    "that run whole operations, as the paper's GPUs do, so that only parallel operations gain: with operation times "
    f"measured here on one thread, {HAND_OVER * 1e6:.0f} us for a hand-over, and the fastest placement that the "
    "planner finds. Simulated GPUs are H200s in bf16, joined by NVLink, whose kernels run at the roofline, and "
    f"{H200.launch_s * 1e6:.1f} us for the launch that a GPU's operations of one level share, as measured on an H100 "
    "inside a CUDA graph: a floor that no kernel of ours reaches."
)


def lanes_ms(program: Program, one_ms: float) -> dict[str, float]:
    """Milliseconds by number of lanes, which is text, as JSON has it. one_ms: on one, which the operations' own times
    are scaled to add up to."""
    alone = on_a_thread(program, torch.float32, None, 1, "native", PASSES).seconds
    factor = one_ms / 1e3 / sum(alone.values())
    core = Measured("a core", {name: factor * seconds for name, seconds in alone.items()}, "measured here")
    return {f"{lanes}": round(1e3 * _fastest(program, core, SHARED, lanes, 4), 5) for lanes in LANES}


def gpus_us(program: Program) -> dict[str, float]:
    """Microseconds by number of simulated GPUs."""
    return {f"{gpus}": round(1e6 * _fastest(program, H200, LINKS["nvlink"], gpus, 2), 3) for gpus in (1, *LANES)}


def _fastest(program: Program, device: Device, link: Link, lanes: int, itemsize: int) -> float:
    """Seconds under the best placement on at most so many lanes."""
    costs = Costs.of(program, device, link, itemsize=itemsize)
    return search(program, costs, lanes, runner_up=False).best.makespan
