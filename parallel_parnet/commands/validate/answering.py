"""Every picture of a split through the engine, an answer per line of a file."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from rich.console import Console
from torch import Tensor

from parallel_parnet import Engine

from ..data.split import Split
from ..infer.lines import AnswerLines
from ..infer.many import Pictures, answer_into


class Work(NamedTuple):
    """What is to be answered. numbers: a folder's class as the network counts it, int64 [classes]. pictures: the
    split's."""

    split: Split
    numbers: np.ndarray
    pictures: Pictures


def answer(lines: AnswerLines, engine: Engine, work: Work, console: Console) -> int:
    """Append the answers that `lines` lacks: "label" and, best first, "top5", or a "reason"; returns how many."""
    truth = dict(zip(work.pictures.names, work.numbers[work.split.truth].tolist(), strict=True))

    def said(image: str, logits: Tensor) -> dict:
        return {"label": truth[image], "top5": logits.topk(min(5, len(logits))).indices.tolist()}

    found = answer_into(lines, engine, work.pictures, said, console, f"{engine.executor}, {engine.arithmetic}")
    return found["pictures"] - found["already_there"]
