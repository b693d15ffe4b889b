"""Pictures through the engine as a stream of requests: decoded in the background, answered in the order given."""

from __future__ import annotations

import random
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from parallel_parnet import Engine, ParNetError
from parallel_parnet.preprocess import Preprocess, read_image

from ..bench.statistics import PERCENTILES
from ..decoding import ahead
from .lines import AnswerLines
from .tables import fault_of

CROPS = 10
KEPT = 1 << 16  # latencies, half a megabyte
EVERY_S = 30.0  # a line of progress, where there is no terminal for a bar


@dataclass(frozen=True)
class Batch:
    """Pictures of one request; `x` fp32 [N, or 10 N for ten crops, 3, H, W] is black where a picture could not be
    read, for a `reason`."""

    images: tuple[str, ...]
    x: Tensor
    reasons: dict[str, str]


@dataclass(frozen=True)
class Pictures:
    """What is to be answered, in this order: pictures 0 to `count` - 1, each by a name that no other has.

    open: a picture; ParNetError where it cannot be read, which ends the run where its name is in `named`, and else
    skips it. ten_crop: whether each is ten inputs of a request, in place of one.
    """

    count: int
    name: Callable[[int], str]
    open: Callable[[int], Image.Image]
    batch_size: int
    preprocess: Preprocess
    ten_crop: bool = False
    named: frozenset[str] = frozenset()

    @classmethod
    def at(cls, paths: list[Path], size: int, preprocess: Preprocess, named: Iterable[Path] = ()) -> Pictures:
        """Those of files, in batches of so many."""
        names, known = list(map(str, paths)), frozenset(map(str, named))
        return cls(len(paths), names.__getitem__, lambda i: read_image(paths[i]), size, preprocess, named=known)

    @property
    def names(self) -> Iterator[str]:
        """Of all of them, in turn."""
        return map(self.name, range(self.count))

    def first(self) -> Tensor:
        """The first request's input, fp32 [N, 3, H, W], without decoding more."""
        return next(replace(self, count=min(self.count, self.batch_size)).batches()).x

    def batches(self, done: Container[str] = ()) -> Iterator[Batch]:
        """Batches decoded by threads. The same ones whatever is `done`, save those of which nothing is left to do, so
        that a continued run computes a picture exactly as an uninterrupted one does."""
        starts = range(0, self.count, self.batch_size)
        groups = (range(i, min(i + self.batch_size, self.count)) for i in starts)
        todo = (group for group in groups if any(self.name(i) not in done for i in group))
        for group, (pixels, reasons) in ahead(todo, self._decode):
            x = self.preprocess.normalise(torch.from_numpy(pixels).flatten(0, 1))
            yield Batch(tuple(map(self.name, group)), x, reasons)

    def _decode(self, group: range) -> tuple[np.ndarray, dict[str, str]]:
        """Pixels uint8 [N, 1 or 10, size, size, 3], black where a picture could not be read, for a reason."""
        size, reasons = self.preprocess.size, {}
        pixels = np.zeros((len(group), CROPS if self.ten_crop else 1, size, size, 3), np.uint8)
        cut = self.preprocess.ten_crop if self.ten_crop else self.preprocess.pixels
        for at, i in enumerate(group):
            try:
                pixels[at] = cut(self.open(i))
            except ParNetError as error:
                if self.name(i) in self.named:
                    raise
                reasons[self.name(i)] = str(error)
        return pixels, reasons


class Latencies:
    """Of requests, in seconds: all of them up to KEPT, of more a random KEPT, so that no run outgrows its memory."""

    def __init__(self) -> None:
        self.kept, self.n = array("d"), 0
        self._random = random.Random(0)

    def add(self, seconds: float) -> None:
        """One more, of which each has had the same chance to be kept at any time."""
        self.n += 1
        if self.n <= KEPT:
            self.kept.append(seconds)
        elif (place := self._random.randrange(self.n)) < KEPT:
            self.kept[place] = seconds

    def spread(self) -> dict[str, float]:
        """As `spread` has it, with how many there were; nothing where there were none."""
        return spread(self.kept) | {"n": self.n} if self.n else {}


def answers(engine: Engine, work: Iterable[Batch], latencies: Latencies) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with its logits, fp32 [N, classes] on the CPU; `latencies` gets its own, queues included."""
    under_way = deque[tuple[Batch, float]]()

    def requests() -> Iterator[Tensor]:
        for batch in work:
            under_way.append((batch, time.perf_counter()))
            yield batch.x.to(engine.device)

    for logits in engine.map(requests()):
        batch, start = under_way.popleft()
        latencies.add(time.perf_counter() - start)
        yield batch, logits.cpu()


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles and mean in milliseconds, and how many there were."""
    milliseconds = np.asarray(seconds) * 1e3
    found = np.percentile(milliseconds, list(PERCENTILES.values())).tolist()
    return dict(zip(PERCENTILES, found, strict=True)) | {"mean": float(milliseconds.mean()), "n": len(seconds)}


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.0f} pictures/s")


def progress_bar(console: Console) -> Progress:
    """Of pictures, with their rate; nothing where the console is no terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def answer_into(
    lines: AnswerLines, engine: Engine, pictures: Pictures, said: Callable[[str, Tensor], dict], console: Console,
    title: str = "classifying",
) -> dict:  # fmt: skip
    """Append the answer of every picture that `lines` lacks; returns counts, pictures per second and latency.

    said: what a line tells of a picture, by its name and logits [classes], which of ten crops are their mean, as the
    released code has it. A picture without an answer has a "reason", and is tried again whenever a run goes on.
    """
    total, latencies = pictures.count, Latencies()
    already = sum(name in lines.done for name in pictures.names)
    if already:
        console.print(f"{lines.path}: {already} of {total} pictures are there already, continuing")
    skipped, faults, start = 0, 0, time.perf_counter()
    told = start
    with progress_bar(console) as progress:
        task = progress.add_task(title, total=total, completed=already)
        for batch, logits in answers(engine, pictures.batches(lines.done), latencies):
            logits = logits.unflatten(0, (len(batch.images), -1)).mean(1)
            new = [(i, image) for i, image in enumerate(batch.images) if image not in lines.done]
            for i, image in new:
                fault = fault_of(image, logits[i])
                reason = batch.reasons.get(image) or fault
                if reason is None or image not in lines.failed:
                    lines.append(image, said(image, logits[i]) if reason is None else {"reason": reason})
                skipped += reason is not None
                faults += fault is not None
            progress.advance(task, len(new))
            if not console.is_terminal and time.perf_counter() - told > EVERY_S:
                told = time.perf_counter()
                print(f"{title}: {progress.tasks[0].completed:.0f} of {total} pictures", file=sys.stderr, flush=True)
    answered, elapsed = total - already, time.perf_counter() - start
    return {
        "pictures": total, "already_there": already, "skipped": skipped, "faults": faults,
        "seconds": elapsed, "pictures_per_s": answered / elapsed, "latency_ms": latencies.spread(),
    }  # fmt: skip
