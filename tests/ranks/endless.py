"""Run by torchrun: request after request, until something happens to a rank. Each rank prints its process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_parnet import Engine, fold
from parallel_parnet.commands.ending import run
from parallel_parnet.commands.ranks import Ranks
from parallel_parnet.transport import join_ranks
from small import SMALL, lively


def main() -> int:
    ranks = Ranks.from_environment()
    ranks.take_threads()
    join_ranks(torch.device("cpu"), 60)
    with Engine(fold(lively(SMALL, 0)), device="cpu", executor="eager") as engine:
        # one string: with PYTHONUNBUFFERED print would write its arguments one by one, between those of other ranks
        sys.stdout.write(f"rank {ranks.rank} {os.getpid()}\n")
        sys.stdout.flush()
        if not engine.is_coordinator:
            return engine.serve()
        while True:
            engine(torch.zeros(1, 3, 32, 32))


if __name__ == "__main__":
    run(main)
