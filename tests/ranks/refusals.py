"""Run by torchrun on two ranks: settings that differ, and requests that no coordinator makes; each rank writes JSON.

refusals.py FILE. Ends with status 2, for the last of the settings that differ.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_parnet import Engine, LaneError, ParNetError, Placement, Program, engine, fold
from parallel_parnet.commands.ending import run
from parallel_parnet.commands.ranks import Ranks
from parallel_parnet.executors import distributed
from parallel_parnet.executors.distributed import RUN, DistributedExecutor
from parallel_parnet.executors.torch_backend import TorchBackend
from parallel_parnet.transport import join_ranks
from parallel_parnet.transport.health import SILENCE_S
from small import SMALL, lively

CPU = torch.device("cpu")
HEADERS = [
    [RUN, 1 << 40, 32, 32, 0], [RUN, 1 << 31, 32, 32, 0], [RUN, 1, 33, 32, 0], [RUN, -1, 32, 32, 0], [7, 1, 32, 32, 0],
    [RUN, 1, 32, 32, 2],
]  # fmt: skip


def differ(program: Program, other: Program, rank: int) -> list[str]:
    """What the ranks say where rank 1 was started with something else."""
    usual, swapped = (
        Placement(2, {op.name: (lane if op.label == "stream 2" else 1 - lane,) for op in program.operations})
        for lane in (0, 1)
    )
    messages = []
    proves = patch.object(engine, "lives_on_gpu", lambda device: True)  # where "auto" has to prove itself
    tiles = patch.object(TorchBackend, "tiles", "others")
    edited = patch.object(distributed, "sources_digest", lambda: "edited")
    for options, change in (
        ({"program": other}, proves), ({"placement": swapped}, proves), ({"executor": "inductor"}, proves),
        ({"dtype": torch.bfloat16}, proves), ({"executor": "triton"}, proves), ({"executor": "auto"}, proves),
        ({"transport": "gloo"}, proves), ({}, tiles), ({}, edited),
    ):  # fmt: skip
        settings = {"program": program, "placement": usual, "device": CPU, "executor": "eager", "transport": "shared"}
        try:
            with change if rank else proves:
                Engine(**(settings | options if rank else settings))  # type: ignore[arg-type]
        except ParNetError as error:
            messages.append(str(error))
    return messages


def refuse(program: Program, rank: int) -> list[str]:
    """What rank 1 says to rank 0's headers."""
    messages = []
    for header in HEADERS:
        serving = Engine(program, device=CPU, executor="eager")
        executor = serving._distributed
        assert isinstance(executor, DistributedExecutor)
        if rank == 0:
            executor.transport.send(torch.tensor(header), executor._header[1])
            continue
        try:
            serving.serve()
        except LaneError as error:
            messages.append(str(error))
    return messages


def main() -> int:
    rank, program, other = Ranks.from_environment().rank, fold(lively(SMALL, 0)), fold(lively(SMALL, 1))
    Ranks.from_environment().take_threads()
    join_ranks(CPU, 30)
    differences, refusals = differ(program, other, rank), refuse(program, rank)
    with Engine(program, device=CPU, executor="eager") as served:
        if rank:  # busy in a way that stops all its threads, for longer than silence is borne: no death
            ctypes.PyDLL(None).sleep(int(SILENCE_S) + 2)
            served.serve()
        else:
            served(torch.randn(1, 3, 32, 32))
    file = Path(sys.argv[1]).with_suffix(f".{rank}.json")
    file.write_text(json.dumps({"differences": differences, "refusals": refusals}))
    Engine(other if rank else program, device=CPU)
    return 0


if __name__ == "__main__":
    run(main)
