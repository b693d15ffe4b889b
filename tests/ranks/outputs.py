"""Run by torchrun: a program's outputs on these ranks, against one lane's, as JSON."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_parnet import Backbone, Engine, Placement, fold
from parallel_parnet.commands.ranks import Ranks
from ranks.started import CPU, started
from small import OPTIONAL, SMALL, lively, relative


def work(seed: int, ranks: Ranks) -> list[dict]:
    model = lively(SMALL, seed)
    inputs = [torch.randn(2, 3, 64, 96), torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)]
    rows = []
    for names in (tuple(model.feature_info.module_name()), ("streams.2", "logits")):
        program = fold(model, outputs=names)
        placement = Placement.by_streams(program, program.streams)
        placement = Placement(ranks.world, placement.where, coordinator=0)
        for executor in ("eager", OPTIONAL[0] if OPTIONAL else "reference"):
            alone = Engine(program, Placement.single(program), CPU, executor=executor)
            with Engine(program, placement, CPU, executor=executor, threads=1) as engine:
                if not engine.is_coordinator:
                    engine.serve()
                    continue
                got, expected = [engine(x) for x in inputs], [alone(x) for x in inputs]
                pairs = [(a[name], b[name]) for a, b in zip(got, expected, strict=True) for name in names]
                # native sums by what a lane has beside it, and torch a single picture by where it lies
                exact = [executor == "eager" and len(a) == 2 for a, _ in pairs]
                mapped = list(engine.map(inputs))
                assert engine._distributed is not None
                threads = engine._distributed.work.backends(False).threads  # type: ignore[attr-defined]
            info = [i for i in Backbone(model).feature_info if i["module"] in names]
            rows.append(
                {
                    "equal": all(torch.equal(*pair) for pair, same in zip(pairs, exact, strict=True) if same),
                    "close": all(relative(*pair) < 1e-5 for pair in pairs),
                    "mapped": all(torch.equal(a[n], b[n]) for a, b in zip(mapped, got, strict=True) for n in names),
                    "threads": threads,
                    "shapes": [list(got[0][i["module"]].shape) for i in info],
                    "said": [[2, i["num_chs"], 64 // i["reduction"], 96 // i["reduction"]] for i in info],
                }
            )
    return rows


if __name__ == "__main__":
    started(work)
