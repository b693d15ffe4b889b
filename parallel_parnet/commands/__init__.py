"""What a person starts: `parnet NAME`, from a clone `python launch/NAME.py`, and `python -m parallel_parnet NAME`
wherever the package is found. Each has a room of its own; what several of them share lies beside this file."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NamedTuple

from parallel_parnet import ParNetError

from .ending import run
from .ranks import Ranks

HELP = frozenset(("-h", "--help"))


class Command(NamedTuple):
    """module: below this package, with a function `main` that returns the exit status. extra: what pip adds for it.
    in_ranks: whether torchrun's ranks do its work together; else they would each do all of it."""

    module: str
    purpose: str
    extra: str = ""
    in_ranks: bool = False


COMMANDS = {
    "infer": Command("infer.command", "classify pictures, and tell the latency", in_ranks=True),
    "validate": Command("validate.command", "top-1 and top-5 of a checkpoint on labelled pictures", in_ranks=True),
    "bench": Command("bench.command", "time every executor and every installed peer side by side", "bench"),
    "bench-report": Command("bench.page", "the benchmark's results as one figure and one page", "bench"),
    "versus": Command("versus.command", "is ParNet faster than ResNet here? both by one engine", "bench"),
    "throughput": Command(
        "throughput.command", "pictures a second and latency as the batch grows, beside peers", "bench"
    ),
    "plan": Command("plan.command", "the fastest placement on so many GPUs, its schedule, and why", "figures"),
    "plan-check": Command("plan.check", "the planner's predictions against this machine"),
    "latency-vs-depth": Command("depth.command", "does latency follow depth, or work? the experiment", "figures"),
    "profile": Command("profile.command", "Nsight, and what a trace says about where the time goes"),
    "train": Command("train.command", "train on labelled pictures, from scratch or from a checkpoint", in_ranks=True),
    "quantize": Command("quantize.command", "the ranges for int8 from pictures, and what each operation then costs"),
    "export": Command("export.command", "the folded network as an ONNX or torch.export file, checked", "export"),
    "gpu-check": Command("gpu.check", "probe, tune, prove and time the kernels on the GPU at hand", "bench"),
    "tune": Command("gpu.tune", "time kernel configurations on the GPU at hand, and keep the best"),
    "compile-report": Command("gpu.compile_report", "what the compiler makes of every level, without a GPU"),
}


def start(name: str) -> None:
    """Run a command with the arguments in sys.argv, and exit with its status."""
    command = COMMANDS[name]

    def main() -> int:
        if not command.in_ranks and HELP.isdisjoint(sys.argv) and Ranks.from_environment().world > 1:
            raise ParNetError(f"{name} runs in one process: start it without torchrun's ranks")
        try:
            return import_module(f".{command.module}", __name__).main()
        except ModuleNotFoundError as error:
            extra = f"[{command.extra}]" if command.extra else ""
            raise ParNetError(f"{name} needs {error.name}: pip install 'parallel_parnet{extra}'") from None

    run(main)


def main() -> None:
    """The console script `parnet`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"parnet {name}"]
        start(name)
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.purpose}" for name, command in COMMANDS.items()]

    def usage() -> int:
        if name not in HELP:
            raise ParNetError(f"parnet {name}: no such command; choose one of {', '.join(COMMANDS)}")
        print("\n".join(["usage: parnet NAME ...; each takes --help", *lines]))
        return 0

    run(usage)
