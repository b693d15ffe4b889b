"""The frame of a script that torchrun runs on ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from parallel_parnet.commands.ending import run
from parallel_parnet.commands.ranks import Ranks
from parallel_parnet.transport import join_ranks

CPU = torch.device("cpu")


def started(work: Callable[[int, Ranks], object]) -> None:
    """SCRIPT SEED FILE: with a thread on each rank, which have joined; what work finds, where it finds anything, is
    written as JSON beside FILE, by rank."""

    def main() -> int:
        seed, file, ranks = int(sys.argv[1]), Path(sys.argv[2]), Ranks.from_environment()
        torch.set_num_threads(1)
        join_ranks(CPU, 60)
        if found := work(seed, ranks):
            file.with_suffix(f".{ranks.rank}.json").write_text(json.dumps(found))
        return 0

    run(main)
