"""What a feature costs between two ranks: each transport that runs here, for the sizes of the networks' features.

    torchrun --nproc-per-node 2 launch/infer.py --measure-links --iterations 300 --json links.json

Rank 1 sends every message back from where it arrived, so that reading it counts; half of the round trip is one
transfer. The planner fits a line through the medians: latency and bandwidth.
"""

from __future__ import annotations

import math
import platform
import time
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.console import Console

from parallel_parnet import LaneError, ParNetError, create_model, fold
from parallel_parnet.files import write_json
from parallel_parnet.planning.costs import Link
from parallel_parnet.program.placement import Transfer
from parallel_parnet.program.program import INPUT
from parallel_parnet.transport import TRANSPORTS, Transport, choose_transport, gather, join_ranks, open_as

from ..common import machine
from ..common import table as make_table
from ..ranks import Ranks

WARM_UP = 20
MODELS = ("parnet_s", "parnet_xl")
ROUTES = [Transfer("a message", 0, 1), Transfer("a message", 1, 0)]


def measure_links(
    wanted: str, ranks: Ranks, device: torch.device, repeats: int, timeout_s: float, file: Path | None, console: Console
) -> int:
    """Measure the transport `wanted`, or every one for "auto"; print a table and write `file`, on rank 0."""
    if ranks.world != 2 or repeats < 2:
        raise ParNetError(
            f"--measure-links on {ranks.world} rank(s), {repeats} times: start two, torchrun --nproc-per-node 2, "
            "and give at least --iterations 2"
        )
    join_ranks(device, timeout_s)
    sizes, names = feature_sizes(), possible(wanted, device)
    transports, lines = connected({name: open_as(name, ROUTES) for name in names}, max(sizes), device)
    for line in lines if ranks.rank == 0 else ():
        console.print(line, markup=False)
    if not transports:
        raise ParNetError(f"no transport to measure: {'; '.join(lines)}")
    times = transfer_times(transports, sizes, repeats, device)
    if ranks.rank:
        return 0
    links = [describe(name, sizes) for name, sizes in times.items()]
    show(links, device, console)
    result = {
        "device": device.type,
        "cpu": machine(torch.device("cpu")),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "links": links,
    }
    if file:
        write_json(file, result)
    return 0


def possible(wanted: str, device: torch.device) -> list[str]:
    """The transports that run between these ranks; ParNetError where the one that is wanted does not."""
    if wanted != "auto":
        return [choose_transport(wanted, device)]
    names = []
    for name in TRANSPORTS[1:]:
        try:
            names.append(choose_transport(name, device))
        except ParNetError:
            continue  # these ranks have not what it needs, on which all of them agree
    return names


def connected(
    transports: dict[str, Transport], most: int, device: torch.device
) -> tuple[dict[str, Transport], list[str]]:
    """Those that are ready for messages of so many bytes, and a line for each that is not, as between GPUs without
    access to each other's memory. On all ranks the same."""
    kept, lines = {}, []
    for name, transport in transports.items():
        reason = ""
        try:
            transport.reserve([most] * len(transport.routes), device)
        except LaneError:
            raise
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        if any(failed for (failed,) in gather([int(bool(reason))])):
            lines.append(f"{name}: left out, {reason or 'since the other rank cannot have it'}")
        else:
            kept[name] = transport
    return kept, lines


def feature_sizes() -> list[int]:
    """Bytes, in fp32, of the picture, the streams' features and the logits of the networks, small to large."""
    sizes = set()
    for model in MODELS:
        with torch.device("meta"):
            network = create_model(model)
        program = fold(network)
        side = program.config.image_size
        names = [INPUT, *(op.name for op in program.operations if op.stage != "stem")]
        sizes |= {math.prod(program.shape(name, 1, side, side)) * 4 for name in names}
    return sorted(sizes)


def transfer_times(
    transports: dict[str, Transport], sizes: list[int], repeats: int, device: torch.device
) -> dict[str, dict[int, list[float]]]:
    """Seconds of one transfer by transport, all of them `connected`, and size: half of each round trip, on rank 0;
    rank 1 answers.

    Transports and sizes take turns, so that a busy moment of the machine falls on all of them; each goes once untimed
    before it goes timed, so that no rank is still busy with the one before.
    """
    times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in transports}
    own = {size: torch.zeros(size // 4, device=device) for size in sizes}
    inboxes = {
        (name, size): transport.inbox(1 - transport.lane, 0, (size // 4,), torch.float32, device)
        for name, transport in transports.items()
        for size in sizes
    }
    for i, ((name, size), inbox), timed in product(range(WARM_UP + repeats), inboxes.items(), (False, True)):
        transport = transports[name]
        inbox.post()
        start = time.perf_counter()
        if transport.lane == 0:
            work = transport.send(own[size], 0)
            transport.wait(inbox, 1)
        else:
            work = transport.send(transport.wait(inbox, 0), 1)
        transport.finish(work, transport.lane)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        inbox.release()
        if timed and i >= WARM_UP:
            times[name][size].append((time.perf_counter() - start) / 2)
    return times


def describe(name: str, times: dict[int, list[float]]) -> dict:
    """A link as `Link.read` takes it."""
    rows = []
    for size, seconds in times.items():
        p10, *_, p90 = quantiles(seconds, n=10, method="inclusive")  # none beyond what was measured
        rows.append({"bytes": size, "median_s": median(seconds), "p10_s": p10, "p90_s": p90})
    link = Link.fit(name, [(row["bytes"], row["median_s"]) for row in rows], "")
    return {"link": name, "latency_s": link.latency_s, "bytes_per_s": link.bytes_per_s, "messages": rows}


def show(links: list[dict], device: torch.device, console: Console) -> None:
    """Medians side by side, how many times slower than the first, and the planner's fits."""
    columns = [f"{link['link']} us (p10 to p90)" for link in links]
    ratios = [f"{link['link']} / {links[0]['link']}" for link in links[1:]]
    table = make_table("kB", *columns, *ratios, title=f"One transfer of tensors on {device.type}")
    for rows in zip(*(link["messages"] for link in links), strict=True):
        cells = [f"{r['median_s'] * 1e6:.0f} ({r['p10_s'] * 1e6:.0f} to {r['p90_s'] * 1e6:.0f})" for r in rows]
        factors = [f"{row['median_s'] / rows[0]['median_s']:.1f}" for row in rows[1:]]
        table.add_row(f"{rows[0]['bytes'] / 1e3:.0f}", *cells, *factors)
    console.print(table)
    for link in links:
        console.print(
            f"{link['link']}: {link['latency_s'] * 1e6:.0f} us + bytes / {link['bytes_per_s'] / 1e9:.2f} GB/s"
        )
