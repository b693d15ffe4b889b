"""The engine that a command's arguments ask for: its flags, its placement, and what ran where, in words."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from parallel_parnet import Engine, ParNetError, Placement, Program
from parallel_parnet.cores import usual_threads
from parallel_parnet.executors.available import EXECUTORS
from parallel_parnet.executors.backends import ON_CPUS, isa
from parallel_parnet.program.contract import dtype_name
from parallel_parnet.transport import TRANSPORTS, gather

from .calibration import FP8, MOST, QUANTISED
from .common import DTYPES, count, pixels, positive
from .plan.measured import find_link, plan_for_ranks
from .ranks import Ranks


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Picture size and batch, placement, device, type, executor, threads and transport."""
    parser.add_argument("--img-size", type=pixels, help="pixels; default: the network's own")
    parser.add_argument("-b", "--batch-size", type=count, default=1, help="pictures per pass (default: %(default)s)")
    parser.add_argument("--streams-per-gpu", type=count, help="branches a device (default: 1, or as many as it takes)")
    parser.add_argument("--placement", choices=["streams", "auto"], default="streams", help="auto: measure and plan")
    parser.add_argument(
        "--link", help="for --placement auto and predictions, as launch/plan.py (default: loopback, on GPUs nvlink)"
    )
    parser.add_argument("--strict", action="store_true", help="refuse rather than fold streams onto fewer devices")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--dtype", choices=[*DTYPES, *QUANTISED], default="float32", help="default: %(default)s")
    parser.add_argument(
        "--calibrate", type=Path, metavar="PATH",
        help=f"for int8 and fp8: a folder of pictures, of which {MOST} are taken; for int8 also what quantize.py wrote",
    )  # fmt: skip
    parser.add_argument("--executor", choices=EXECUTORS, default="auto", help="default: %(default)s")
    parser.add_argument(
        "--threads", type=int, help="compute threads; default: OMP_NUM_THREADS, else its share of cores"
    )
    parser.add_argument("--transport", choices=TRANSPORTS, default="auto", help="of features between ranks")
    parser.add_argument("--timeout", type=positive, default=60, help="seconds for an operation (default: %(default)s)")


def check_engine_arguments(args: argparse.Namespace) -> None:
    """ParNetError where one argument would make another mean nothing."""
    if args.placement == "auto" and (args.streams_per_gpu or args.strict):
        raise ParNetError("--placement auto chooses the lanes by itself: leave --streams-per-gpu and --strict out")
    if args.link:
        pages = [name for name in ("trace", "report") if hasattr(args, name)]
        if args.placement != "auto" and not any(getattr(args, name) for name in pages):
            uses = ", ".join(["--placement auto", *(f"--{name}" for name in pages)])
            raise ParNetError(f"--link is for {uses}: add one, or leave --link out")
        find_link(args.link)  # a wrong one is told before anything runs
    if args.calibrate and not {args.dtype, getattr(args, "against", None)} & QUANTISED.keys():
        raise ParNetError("--calibrate is for int8 and fp8: add --dtype int8 or fp8, or leave it out")


def type_of(name: str, executor: str) -> torch.dtype:
    """What an engine is given for a --dtype: a quantised program has its types itself, beside fp32, or bf16 where the
    kernels run it."""
    if name == FP8 and executor in ("triton", "cuda_graph"):
        return torch.bfloat16
    return torch.float32 if name in QUANTISED else DTYPES[name]


def precision(engine: Engine) -> str:
    """What was asked for, as --dtype has it."""
    names = {dtype: name for name, dtype in QUANTISED.items()}
    stored = engine.program.quantised
    return names[stored] if stored else dtype_name(engine.dtype)


def place(
    program: Program, args: argparse.Namespace, ranks: Ranks, device: torch.device, console: Console
) -> Placement | None:
    """The placement that was asked for, or the nearest that one process can have, and a line that says so; None where
    one process is to choose by measuring."""
    k, streams = args.streams_per_gpu or 1, program.streams
    if args.placement == "auto":
        if ranks.world == 1 and device.type == "cpu":
            return None
        link = find_link(args.link or ("nvlink" if device.type == "cuda" else "loopback"))
        dtype = type_of(args.dtype, args.executor)
        return plan_for_ranks(program, ranks, device, dtype, args.img_size, args.batch_size, link, args.executor)
    wanted = -(-streams // k)
    if ranks.world > 1:
        if ranks.world < wanted and (args.streams_per_gpu or args.strict):
            raise ParNetError(
                f"{ranks.world} lanes x {k} streams per GPU do not cover {streams} streams: "
                f"give {wanted} lanes or --streams-per-gpu {-(-streams // ranks.world)}"
            )
        return Placement.by_streams(program, ranks.world)
    whole_machine = device.type == "cuda" and device.index is None
    devices = torch.cuda.device_count() if whole_machine and args.executor != "cuda_streams" else 1
    if devices > 1 and args.executor == "auto" and not (args.streams_per_gpu or args.strict):
        console.print(f"note: one of {devices} GPUs runs it; --streams-per-gpu 1 gives each stream its own")
        return None
    if devices >= wanted:
        return Placement.by_streams(program, wanted)
    note = (
        f"this process sees {devices} device ({device.type}) where {k} stream(s) per GPU want {wanted}: "
        f"{streams} streams share {devices} lane(s); "
        f"torchrun --nproc-per-node {wanted} gives each lane a process of its own"
    )
    if args.strict:
        raise ParNetError(note)
    if args.executor == "cuda_streams":  # whose lanes are CUDA streams of one GPU, so that there are always enough
        return Placement.by_streams(program, wanted)
    if device.type == "cuda" and devices == 1 and args.executor == "auto":  # which tries CUDA streams beside one lane
        if k > 1:
            console.print(f"note: on one GPU lanes are chosen by measuring, not by {k} streams per GPU")
        return None
    if device.type != "cpu":  # on which the streams of a level share its threads all the same
        console.print(f"note: {note}")
    return Placement.by_streams(program, devices)


def warm_up(engine: Engine, x: Tensor, console: Console) -> None:
    """Compile for a request like this, and choose where nobody did; says what was measured."""
    if engine.device.type == "cuda":
        console.print("compiling kernels for this GPU, where it has none cached: up to some minutes")
    for name, seconds in engine.warm_up(x.to(engine.device)).items():
        console.print(f"measured: {name}: {seconds * 1e3:.3f} ms")


def threads_of(engine: Engine) -> int:
    """How many threads compute a lane on the CPU: kernels take no more than there are cores."""
    return engine.threads or (usual_threads() if engine.executor in ON_CPUS else torch.get_num_threads())


def lane_hosts(engine: Engine, ranks: Ranks) -> list[tuple[str, int]]:
    """Device and compute threads of each lane."""
    threads = threads_of(engine)
    if ranks.world == 1:
        return [(str(engine.lane_device(lane)), threads) for lane in range(engine.placement.lanes)]
    index = -1 if engine.device.index is None else engine.device.index
    everyone = gather([threads, index])
    return [(engine.device.type if i < 0 else f"{engine.device.type}:{i}", count) for count, i in everyone]


def describe(engine: Engine, args: argparse.Namespace, weights: str, hosts: list[tuple[str, int]], world: int) -> dict:
    """What runs, and where."""
    program, placement = engine.program, engine.placement
    return {
        "placement": {
            "streams_per_gpu": None if args.placement == "auto" else args.streams_per_gpu or 1,
            "lanes": [
                {"lane": i, "device": device, "threads": threads, "runs": runs}
                for i, ((device, threads), runs) in enumerate(zip(hosts, placement.describe(program), strict=True))
            ],
            "operations": {name: list(lanes) for name, lanes in placement.where.items()},
        },
        "executor": engine.executor,
        "device": str(engine.device),
        "dtype": precision(engine),
        "arithmetic": dtype_name(engine.arithmetic),
        "isa": isa(engine.executor),
        "world_size": world,
        "depth": program.depth,
        "batch_size": args.batch_size,
        "size": args.img_size or program.config.image_size,
        "weights": weights,
    }
