"""What commands share: arguments, the network to run, and what they print with."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Column, Table

from parallel_parnet import ParNet, ParNetError, ParNetWarning, create_model, load_checkpoint
from parallel_parnet.cores import cores
from parallel_parnet.network.variants import ACTIVATIONS, MOST

from .ranks import within

ROOT = Path(__file__).resolve().parents[2]
CLONE = (ROOT / "launch").is_dir()
RESULTS = ROOT / "results" if CLONE else Path()
DEMO = (ROOT / "parallel_parnet" / "demo").resolve()  # launch/demo, and in a wheel the package's own
DEMO_MODEL = "parnet_fashion"
S_TO_XL = ("parnet_s", "parnet_m", "parnet_l", "parnet_xl")
RANDOM = "random"  # where weights come from without a file
MOST_COLUMNS = 10_000
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


def pixels(text: str) -> int:
    """The side of a picture, as an argument."""
    if (number := within(text, 1, MOST)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} pixels: give a positive number, at most {MOST}")
    return number


def positive(text: str) -> float:
    """A number above zero, as an argument."""
    if (number := _number_within_reason(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text}: must be positive")
    return number


def count(text: str) -> int:
    """A whole number above zero, as an argument."""
    if (number := _whole_number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def typed() -> str:
    """The command line of this process, as it can be given again."""
    program, *arguments = sys.argv
    by_script = program.endswith(".py")  # else "parnet NAME", for an install has no scripts
    return shlex.join([*(["python", f"launch/{Path(program).name}"] if by_script else program.split()), *arguments])


def named(text: str) -> Path:
    """A file from whose name others' are made, as an argument."""
    if (path := Path(text)).name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} has no name of its own: give that of a file")
    return path


def check_folder(out: Path) -> None:
    """ParNetError, before any work is done for them, where no results can be put into the folder --out."""
    if not os.path.isdir(out):
        raise ParNetError(f"--out {out}: no such folder")
    if not os.access(out, os.W_OK):
        raise ParNetError(f"--out {out}: cannot be written (not yours to write)")


class _Plain(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # to `run`, where Console would exit with 1


def plain_console(in_files: int | None = None, **options: Any) -> Console:
    """For names of files and classes, which are the user's: a bracket in one is no markup, and a colon no emoji.
    in_files: columns where it is no terminal that is written to."""
    for name in ("COLUMNS", "LINES"):
        if within(os.environ.get(name, "1"), 1, MOST_COLUMNS) is None:
            del os.environ[name]  # rich takes what it cannot read for a number, and no terminal is so wide
    console = _Plain(highlight=False, markup=False, emoji=False, **options)
    if in_files and not console.is_terminal:
        console.width = in_files
    return console


def table(*heads: str, title: str | None = None) -> Table:
    """A table whose cells are folded where the terminal is narrow, and never cut."""
    return Table(*(Column(head, overflow="fold") for head in heads), title=title, title_justify="left")


def machine(device: torch.device) -> str:
    """The device in plain words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")  # torch does not tell AMX from AVX512
    vectors = torch.backends.cpu.get_cpu_capability()
    best = "AMX" if about.exists() and "amx_tile" in about.read_text() else vectors
    return f"{cores()}-core {os.uname().machine.replace('_', '-')} ({best})"


def slug(machine: str) -> str:
    """A machine's name for use in a file's."""
    return re.sub("[^a-z0-9]+", "-", machine.lower()).strip("-")


def process_age() -> float | None:
    """Seconds since this process was started, imports included; None where only Linux would tell."""
    try:
        stat = Path("/proc/self/stat").read_bytes()  # with the process's name, cut where a letter may not end
        started = int(stat.rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Parser(argparse.ArgumentParser):
    """Shows its description as it is written, and raises ParNetError for wrong arguments, so that one rank speaks for
    all. Its whole numbers have 32 bits: no command counts further, and what torch says to larger ones is no line that
    helps. Others are no larger, and no NaN, which is neither too small nor too large for any limit."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.register("type", int, _whole_number)
        self.register("type", float, _number_within_reason)

    def error(self, message: str) -> NoReturn:
        raise ParNetError(f"{message}; see --help")

    def print_help(self, file: Any = None) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank speaks for all
            super().print_help(file)


def _whole_number(text: str) -> int:
    number = int(text)
    if abs(number) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text} is beyond {2**31 - 1}")
    return number


def _number_within_reason(text: str) -> float:
    number = float(text)
    if not abs(number) < 2**31:
        raise argparse.ArgumentTypeError(f"{text}: give a number of at most {2**31 - 1}")
    return number


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model or --checkpoint, and what goes with them, named as in timm."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-m", "--model", help=f"variant, with random weights but for the demo (default: {DEMO_MODEL})")
    source.add_argument("--checkpoint", type=Path, help="released .pth.tar or own .safetensors")
    parser.add_argument("--ema", action="store_true", help="take the checkpoint's averaged weights")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="default: the checkpoint's own, else silu")
    parser.add_argument("--num-classes", type=int, help="of a variant with random weights")
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default: %(default)s)")


def load_model(args: argparse.Namespace) -> tuple[ParNet, str]:
    """The network in evaluation mode, and where its weights come from: a file's path, or "random"."""
    demo = args.checkpoint is None and args.model in (None, DEMO_MODEL)
    checkpoint = DEMO / f"{DEMO_MODEL}.safetensors" if demo and args.num_classes is None else args.checkpoint
    if checkpoint is not None:
        if args.num_classes is not None:
            raise ParNetError("--num-classes: a checkpoint has its own; leave it out")
        return read_checkpoint(checkpoint, args), str(checkpoint.relative_to(ROOT) if demo else checkpoint)
    if args.ema:
        raise ParNetError("--ema: random weights have no average; give a --checkpoint")
    least = 0 if getattr(args, "outputs", None) else 1  # features need no classifier
    if args.num_classes is not None and args.num_classes < least:
        raise ParNetError(f"--num-classes {args.num_classes}: must be at least {least}")
    torch.manual_seed(args.seed)
    model = create_model(
        DEMO_MODEL if args.model is None else args.model, num_classes=args.num_classes, activation=args.activation
    )
    return fit_norms(model), RANDOM


def read_checkpoint(path: Path, args: argparse.Namespace) -> ParNet:
    """What `load_checkpoint` makes of a file, and its warnings as lines on stderr."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ParNetWarning)
        model = load_checkpoint(path, ema=args.ema, activation=args.activation)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank speaks for all
        for warning in told:
            print(warning.message, file=sys.stderr)
    return model


@torch.no_grad()
def fit_norms(model: ParNet) -> ParNet:
    """Fit the batch norms of random weights to what pictures are like, so that features neither vanish nor grow.

    Vanished features would time denormal numbers, and hide every difference between two executors. Norms fitted to
    noise alone let a photograph's even areas grow from level to level, and rounding with them.
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    brightness, grain = 2 * torch.randn(4, 1, 1, 1), 0.3 * torch.randn(4, 3, 64, 64)
    areas = torch.nn.functional.interpolate(torch.randn(4, 3, 4, 4), 64, mode="bilinear")
    model.train()(brightness + areas + grain)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()
