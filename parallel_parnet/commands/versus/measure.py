"""A network's latencies: by our engine on one thread and on all, and by every peer at hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parallel_parnet import Engine, ParNetError

from ..bench.measure import COMPARED, Settings, contenders, time_all
from ..bench.poster import Quoted, subject_of
from ..bench.proof import agrees, expected_logits, prove_ours
from ..bench.running import Entry, set_up
from ..bench.statistics import median_interval, summary
from ..bench.subject import Contender, Runner, Subject
from ..sections import NAMES
from .simulated import gpus_us, lanes_ms
from .verdict import pairs

Row = dict
CPU = torch.device("cpu")
# those that are installed, from the file of launch/export.py; where none is, torch, which is slower than any of them
PEERS, LAST = ("OpenVINO, exported", "ONNX Runtime, exported", "ncnn, exported", "MNN, exported"), "eager, fused"


def by_native(threads: int) -> Contender:
    """Our CPU kernels on so many threads."""

    def build(subject: Subject) -> Runner:
        engine = Engine(subject.program, device=CPU, executor="native", threads=threads)
        return Runner(engine, f"executor native, {threads} thread(s)", "float32")

    return Contender(f"{threads}", True, build)


def group(table: Sequence[Quoted]) -> list[list[Quoted]]:
    """Networks whose times are compared, together: they take turns, so that a slow spell of the machine hits all."""
    rows = [{"top1": q.top1, "ours": is_ours(q), "quoted": q} for q in table]
    groups: dict[str, list[Quoted]] = {q.name: [q] for q in table if is_ours(q)}
    for parnet, rival in pairs(rows):
        groups[parnet["quoted"].name].append(rival["quoted"])
    return list(groups.values())


def is_ours(quoted: Quoted) -> bool:
    return quoted.name.startswith("parnet")


def measure(networks: Sequence[Quoted], cores: int, settings: Settings) -> list[Row]:
    """All that is known of networks here: as published, as measured in turns, and as simulated. Times in ms, by threads
    or lanes.

    Raises ParNetError where our answers are not the reference's. A peer that disagrees or cannot run is left out.
    """
    entries: list[list[Entry]] = []
    for quoted in networks:
        subject = subject_of(quoted.name, CPU, torch.float32, cores)
        compared = subject.pictures(COMPARED)
        expected = expected_logits(subject, compared)
        ours = [set_up(by_native(threads), subject, compared, expected) for threads in dict.fromkeys((1, cores))]
        prove_ours(ours)
        if missing := [entry.missing for entry in ours if entry.missing]:
            raise ParNetError(f"{NAMES[quoted.name]} by our kernels: {missing[0]}")
        peers: list[Entry] = []
        for names in (PEERS, (LAST,)):
            tried = [set_up(c, subject, compared, expected) for c in contenders(names)] if not peers else []
            peers += [entry for entry in tried if agrees(entry)]
        entries.append([*ours, *peers])
    together = [entry for own in entries for entry in own]
    time_all(together, settings, lambda: None)
    return [row_of(quoted, own) for quoted, own in zip(networks, entries, strict=True)]


def row_of(quoted: Quoted, entries: Sequence[Entry]) -> Row:
    """A network's row, from those that were timed; its "peer" is None where no other library was."""
    found = {entry.name: _times(entry) for entry in entries}
    one, subject, program = found["1"]["ms"], entries[0].subject, entries[0].subject.program
    ours, peers = ([e.name for e in entries if e.contender.ours == mine] for mine in (True, False))
    return {
        "network": NAMES[quoted.name], "ours": is_ours(quoted), "top1": quoted.top1,
        "depth": quoted.depth, "levels": program.depth, "parameters_m": round(program.parameters / 1e6, 2),
        "gflop": round(subject.flops / 1e9, 2),
        "threads": {name: found[name] for name in ours}, "peers": {name: found[name] for name in peers},
        "peer": min(peers, key=lambda name: found[name]["ms"], default=None),
        "lanes_ms": {"1": one, **lanes_ms(program, one)}, "gpus_us": gpus_us(program),
    }  # fmt: skip


def _times(entry: Entry) -> Row:
    interval = [round(t * 1e3, 3) for t in median_interval(entry.latency)]
    return {"ms": summary(entry.latency)["median"], "interval_ms": interval, "n": len(entry.latency)}
