"""Run by torchrun with TRITON_INTERPRET=1: Triton's segments on these ranks against one lane, bit for bit, as JSON."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_parnet import Config, Engine, Placement, fold
from parallel_parnet.commands.ranks import Ranks
from ranks.started import CPU, started
from small import lively

SMALLEST = Config((4, 8, 8, 8), blocks=(1, 1, 1), num_classes=4)
DTYPE = torch.float16


def work(seed: int, ranks: Ranks) -> list[dict]:
    program = fold(lively(SMALLEST, seed))
    torch.manual_seed(seed)
    pictures = [torch.randn(1, 3, 32, 32), torch.randint(0, 256, (1, 3, 32, 32)).byte()]
    stream = [*pictures, pictures[0].flip(2), pictures[0].flip(3)]
    results: list[dict] = []
    expected: list[torch.Tensor] = []
    for executor, transport in (("triton", "shared"), ("cuda_graph", "gloo")):
        with Engine(program, None, CPU, DTYPE, executor, transport) as engine:
            if not engine.is_coordinator:
                engine.serve()
                continue
            alone = Engine(program, Placement.single(program), CPU, DTYPE, "triton")
            expected = expected or [alone(x) for x in stream]
            single = engine(pictures[0])
            spans = [span.name for lane in engine.profile(pictures[0]) for span in lane.spans]
            mapped = list(engine.map(stream))
            results.append(
                {
                    "executor": executor,
                    "lanes": ranks.world,
                    "single": torch.equal(single, expected[0]),
                    "mapped": [torch.equal(*pair) for pair in zip(mapped, expected, strict=True)],
                    "differ": not torch.equal(expected[0], expected[-1]),
                    "operations": sorted({name for name in spans if name in program.by_name})
                    == sorted(program.by_name),
                }
            )
    return results


if __name__ == "__main__":
    started(work)
