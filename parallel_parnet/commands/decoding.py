"""Work done by threads a little ahead of who asks for it: memory stays bounded, and nobody waits for a decoder."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from parallel_parnet.cores import cores

Task = TypeVar("Task")
Done = TypeVar("Done")
DECODERS = min(4, cores())
AHEAD = 2 * DECODERS


def ahead(tasks: Iterable[Task], work: Callable[[Task], Done]) -> Iterator[tuple[Task, Done]]:
    """Each task with what `work` made of it, in order; at most AHEAD are made and not yet taken."""
    todo = iter(tasks)
    pool, waiting = ThreadPoolExecutor(DECODERS, "decode"), deque[tuple[Task, Future[Done]]]()
    try:
        while True:
            waiting.extend((task, pool.submit(work, task)) for task in islice(todo, AHEAD - len(waiting)))
            if not waiting:
                return
            task, done = waiting.popleft()
            yield task, done.result()
    finally:
        pool.shutdown(cancel_futures=True)
