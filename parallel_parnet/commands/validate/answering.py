"""Every picture of a split through the engine, an answer per line of a file."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console

from parallel_parnet import Engine, ParNetError
from parallel_parnet.preprocess import Preprocess

from ..data.split import Split
from ..decoding import ahead
from ..infer.lines import AnswerLines
from ..infer.many import Batch, Latencies, answers, progress_bar
from ..infer.tables import fault_of

CROPS = 10


@dataclass(frozen=True)
class Work:
    """What is to be answered. numbers: a folder's class as the network counts it, int64 [classes]."""

    split: Split
    numbers: np.ndarray
    preprocess: Preprocess
    batch_size: int
    ten_crop: bool

    @property
    def names(self) -> Iterator[str]:
        """Of all pictures, in turn."""
        return map(self.split.name, range(len(self.split)))

    def batches(self, done: Container[str]) -> Iterator[Batch]:
        """Requests of `batch_size` pictures, ten inputs each for ten crops, without those of which all is done."""
        starts = range(0, len(self.split), self.batch_size)
        groups = (range(i, min(i + self.batch_size, len(self.split))) for i in starts)
        todo = (group for group in groups if any(self.split.name(i) not in done for i in group))
        for group, (pixels, reasons) in ahead(todo, self._decode):
            x = self.preprocess.normalise(torch.from_numpy(pixels).flatten(0, 1))
            yield Batch(tuple(map(self.split.name, group)), x, reasons)

    def _decode(self, group: range) -> tuple[np.ndarray, dict[str, str]]:
        """Pixels uint8 [N, 1 or 10, size, size, 3], black where a picture could not be read, for a reason."""
        size, reasons = self.preprocess.size, {}
        pixels = np.zeros((len(group), CROPS if self.ten_crop else 1, size, size, 3), np.uint8)
        cut = self.preprocess.ten_crop if self.ten_crop else self.preprocess.pixels
        for at, i in enumerate(group):
            try:
                pixels[at] = cut(self.split.open(i))
            except ParNetError as error:
                reasons[self.split.name(i)] = str(error)
        return pixels, reasons


def answer(lines: AnswerLines, engine: Engine, work: Work, console: Console) -> int:
    """Append the answers that `lines` lacks: "label" and, best first, "top5", or a "reason"; returns how many."""
    split, already = work.split, sum(name in lines.done for name in work.names)
    if already:
        console.print(f"{lines.path}: {already} of {len(split)} pictures are there already, continuing")
    truth = dict(zip(work.names, work.numbers[split.truth].tolist(), strict=True))
    with progress_bar(console) as progress:
        task = progress.add_task(f"{engine.executor}, {engine.arithmetic}", total=len(split), completed=already)
        for batch, logits in answers(engine, work.batches(lines.done), Latencies()):
            logits = logits.unflatten(0, (len(batch.images), -1)).mean(1)  # as the released code averages crops
            best = logits.topk(min(5, logits.shape[1])).indices.tolist()
            new = [(i, image) for i, image in enumerate(batch.images) if image not in lines.done]
            for i, image in new:
                reason = batch.reasons.get(image) or fault_of(image, logits[i])
                lines.append(image, {"reason": reason} if reason else {"label": truth[image], "top5": best[i]})
            progress.advance(task, len(new))
    return len(split) - already
