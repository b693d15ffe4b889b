"""Run by torchrun: every transport, placement, batch and size on these ranks, against the reference, as JSON."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import weakref
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_parnet import Engine, Placement, Program, fold
from parallel_parnet.commands.ranks import Ranks
from ranks.started import CPU, started
from small import SMALL, lively, relative


def placements(program: Program, lanes: int) -> dict[str, Placement]:
    """The usual one; and one where fusion wanders over the lanes, the last answers, and the stem is transferred."""
    usual = Placement.by_streams(program, lanes)
    if lanes == 1:
        return {"usual": usual}
    where = dict(usual.where)
    for op in program.operations:
        if op.stage == "stem":
            where[op.name] = (0,)
        elif op.stage in ("fusion", "head"):
            where[op.name] = (op.level % lanes,)
    return {"usual": usual, "wandering": Placement(lanes, where, coordinator=lanes - 1)}


def digest(answers: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(answer.numpy().tobytes() for answer in answers)).hexdigest()


def listening() -> list[str]:
    """Local addresses, as /proc writes them, of the sockets that this process listens on."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink() and path.exists()]
    own = {link[8:-1] for link in links if link.startswith("socket:")}
    rows = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{name}").read_text().splitlines()
    ]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in own]


def next_is_under_way(engine: Engine) -> bool:
    """Whether a map has announced another request than those that it has answered."""
    return bool(engine._distributed and engine._distributed._pending)


def work(seed: int, ranks: Ranks) -> list[dict]:
    program = fold(lively(SMALL, seed))
    torch.manual_seed(seed)
    inputs = [torch.randn(n, 3, h, w) for n in (1, 4) for h, w in ((32, 64), (96, 32))]
    reference = Engine(program, Placement.single(program), CPU, executor="reference")
    results, lanes = [], []
    gc.disable()  # memory goes with the last reference
    for name, placement in placements(program, ranks.world).items():
        for transport in ("gloo", "shared"):
            with Engine(program, placement, CPU, executor="eager", transport=transport) as engine:
                if engine._distributed:
                    lanes.append(weakref.ref(engine._distributed.work))
                if not engine.is_coordinator:
                    engine.serve()
                    continue
                answers = [engine(x) for x in inputs]
                kept = [answer.clone() for answer in answers]
                stream = [x for x in inputs for _ in range(5)] + inputs
                mapped = list(engine.map(stream))
                some = engine.map(iter(stream))
                first = next(some)
                ahead = next_is_under_way(engine)
                some.close()  # the caller gives up with requests under way
                mixed = engine.map([inputs[0], torch.randn(2, 3, 32, 32)])
                next(mixed)
                alone = not next_is_under_way(engine)
                mixed.close()
                again = [engine(x) for x in inputs]
                spans = [span.name for lane in engine.profile(inputs[0]) for span in lane.spans]
                results.append(
                    {
                        "placement": name,
                        "transport": transport,
                        "errors": [relative(a, reference(x)) for a, x in zip(answers, inputs, strict=True)],
                        "digest": digest(answers),
                        "repeated": digest(again),
                        "mapped": digest(mapped[:20:5]),
                        "mapped_again": digest(mapped[-4:]),
                        "first": torch.equal(first, answers[0]),
                        "ahead": ahead,
                        "alone": alone,
                        "kept": all(torch.equal(a, b) for a, b in zip(kept, answers, strict=True)),
                        "spans": spans,
                        "listening": listening(),
                    }
                )
    del engine
    assert all(lane() is None for lane in lanes), "an engine is kept until cycles are looked for"
    return results


if __name__ == "__main__":
    started(work)
