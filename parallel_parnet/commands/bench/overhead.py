"""What the engine itself costs per call on the host: its call, less the call of the library that does the work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from torch import Tensor

# module, class and method by which executors hand the work over
HANDED_TO = (
    ("openvino", "InferRequest", "infer"),
    ("parallel_parnet.executors.native_plan", "NativePlan", "run"),
    ("torch.cuda", "CUDAGraph", "replay"),
)


@contextmanager
def watched(owner: Any, method: str) -> Iterator[list[float]]:
    """Seconds that each call of a method takes, while the context lasts."""
    original, spent = getattr(owner, method), []

    def watch(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        answer = original(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return answer

    setattr(owner, method, watch)
    try:
        yield spent
    finally:
        setattr(owner, method, original)


def host_overhead(
    call: Callable[[Tensor], object], wait: Callable[[Any], object], pictures: Sequence[Tensor], runs: int
) -> float | None:
    """Median seconds of a call outside of the library's own; None where it hands nothing over, or more than once.

    Both are timed within the same call: a difference between two runs would drown microseconds in their noise.
    """
    for module, owner, method in HANDED_TO:
        if module not in sys.modules:
            continue
        rests = []
        with watched(getattr(sys.modules[module], owner), method) as spent:
            for i in range(runs):
                before = len(spent)
                start = time.perf_counter()
                answer = call(pictures[i % len(pictures)])
                whole = time.perf_counter() - start
                wait(answer)
                if len(spent) != before + 1:
                    break
                rests.append(whole - spent[-1])
        if len(rests) == runs:
            return median(rests)
    return None
