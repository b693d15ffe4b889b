"""What every command needs: its rank, the network to run, and errors in one line."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import EBADF, ENOSPC
from io import TextIOWrapper
from pathlib import Path
from signal import SIGPIPE
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Column, Table

from parallel_parnet import LaneError, ParNet, ParNetError, create_model, load_checkpoint
from parallel_parnet.engine import MOST_THREADS
from parallel_parnet.executors.available import find_device
from parallel_parnet.network.variants import MOST
from parallel_parnet.transport import health, leave_ranks

from .stopping import Stopped

ROOT = Path(__file__).resolve().parents[2]
CLONE = (ROOT / "launch").is_dir()
RESULTS = ROOT / "results" if CLONE else Path()
DEMO = (ROOT / "parallel_parnet" / "demo").resolve()  # launch/demo, and in a wheel the package's own
DEMO_MODEL = "parnet_fashion"
RANDOM = "random"  # where weights come from without a file
DIGITS = 20
MOST_COLUMNS = 10_000
SILENCE_S = 5.0  # of ranks that have an error, before they say it themselves
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


def words(dtype: torch.dtype) -> str:
    """A type's name without its module."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; alone without torchrun."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun says in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; other launchers leave the local ones
        out, whose ranks then count as this machine's. ParNetError where they cannot be right."""
        world = _number("WORLD_SIZE", 1, 1)
        if world > 1 and "RANK" not in os.environ:
            raise ParNetError(
                f"WORLD_SIZE='{world}' in the environment without RANK: torchrun sets both, else unset both"
            )
        rank = _number("RANK", 0, 0, world - 1)
        local_world = _number("LOCAL_WORLD_SIZE", world, 1, world)
        return cls(rank, world, _number("LOCAL_RANK", rank % local_world, 0, local_world - 1), local_world)

    def take_threads(self, wanted: int | None = None) -> int:
        """Give this process as many threads as are `wanted`, else, where it is alone, as OMP_NUM_THREADS says (which
        torchrun sets to 1 for ranks), else its share of the cores, at least one; and say how many."""
        asked = os.environ.get("OMP_NUM_THREADS", "") if self.world == 1 else ""
        if wanted is not None and not 1 <= wanted <= MOST_THREADS:
            raise ParNetError(f"--threads {wanted}: must be at least 1, and at most {MOST_THREADS}")
        threads = wanted or _within(asked, 1, MOST_THREADS) or max(1, cores() // self.local_world)
        torch.set_num_threads(threads)
        return threads

    def device(self, wanted: str | None) -> torch.device:
        """The device of this rank: ranks of one machine take its GPUs in turn."""
        device = find_device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None and self.world > 1:
            return torch.device("cuda", self.local_rank % max(1, torch.cuda.device_count()))
        return device


def cores() -> int:
    """That this process may use: those it is bound to, or fewer where a control group grants less time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *(math.floor(quota) for quota in quotas())]))


def quotas(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Cores' worth of time that control groups of version 2 or 1 grant, of this process's own and those above it."""
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        for folder in {top, *(top / path.strip("/")).parents, top / path.strip("/")}:
            if (file := folder / "cpu.max").is_file():
                quota, period = file.read_text().split()
            elif (file := folder / "cpu.cfs_quota_us").is_file():
                quota, period = file.read_text().strip(), (folder / "cpu.cfs_period_us").read_text().strip()
            else:
                continue
            if quota.isdecimal():  # neither "max" nor -1
                yield int(quota) / int(period)


def _number(name: str, default: int, least: int, most: int = 1 << 20) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if (number := _within(text, least, most)) is None:
        raise ParNetError(
            f"{name}={text!r} in the environment: torchrun sets {least} to {most}; without it, unset {name}"
        )
    return number


def _within(text: str, least: int, most: int) -> int | None:
    """The number that a text says, None for any other text: also for digits by the thousand, which int refuses."""
    number = int(text) if text.isdecimal() and len(text) <= DIGITS else -1
    return number if least <= number <= most else None


def pixels(text: str) -> int:
    """The side of a picture, as an argument."""
    if (number := _within(text, 1, MOST)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} pixels: give a positive number, at most {MOST}")
    return number


def positive(text: str) -> float:
    """A number above zero, as an argument."""
    if (number := _number_within_reason(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text}: must be positive")
    return number


def typed() -> str:
    """The command line of this process, as it can be given again."""
    program, *arguments = sys.argv
    by_script = program.endswith(".py")  # else "parnet NAME", for an install has no scripts
    return shlex.join([*(["python", f"launch/{Path(program).name}"] if by_script else program.split()), *arguments])


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
        if _within(os.environ.get(name, "1"), 1, MOST_COLUMNS) is None:
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
    return f"{cores()}-core {os.uname().machine.replace('_', '-')} ({torch.backends.cpu.get_cpu_capability()})"


def slug(machine: str) -> str:
    """A machine's name for use in a file's."""
    return re.sub("[^a-z0-9]+", "-", machine.lower()).strip("-")


def process_age() -> float | None:
    """Seconds since this process was started, imports included; None where only Linux would tell."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Parser(argparse.ArgumentParser):
    """Raises ParNetError for wrong arguments, so that one rank speaks for all. Its whole numbers have 32 bits: no
    command counts further, and what torch says to larger ones is no line that helps. Others are no larger, and no NaN,
    which is neither too small nor too large for any limit."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", int, _whole_number)
        self.register("type", float, _number_within_reason)

    def error(self, message: str) -> NoReturn:
        raise ParNetError(f"{message}; see --help")


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
    parser.add_argument("--activation", choices=["silu", "relu"], help="default: the checkpoint's own, else silu")
    parser.add_argument("--num-classes", type=int, help="of a variant with random weights")
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default: %(default)s)")


def load_model(args: argparse.Namespace) -> tuple[ParNet, str]:
    """The network in evaluation mode, and where its weights come from: a file's path, or "random"."""
    demo = args.checkpoint is None and args.model in (None, DEMO_MODEL)
    checkpoint = DEMO / f"{DEMO_MODEL}.safetensors" if demo and args.num_classes is None else args.checkpoint
    if checkpoint is not None:
        if args.num_classes is not None:
            raise ParNetError("--num-classes: a checkpoint has its own; leave it out")
        model = load_checkpoint(checkpoint, ema=args.ema, activation=args.activation)
        return model, str(checkpoint.relative_to(ROOT) if demo else checkpoint)
    if args.ema:
        raise ParNetError("--ema: random weights have no average; give a --checkpoint")
    torch.manual_seed(args.seed)
    model = create_model(args.model or DEMO_MODEL, num_classes=args.num_classes, activation=args.activation)
    return settle(model), RANDOM


@torch.no_grad()
def settle(model: ParNet) -> ParNet:
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


def run(main: Callable[[], int]) -> None:
    """Exit with main's status: 2 and one line on stderr, from one rank of each machine, where the input is at fault;
    1 where another rank was lost or the program itself failed; 130 after SIGINT; with `stop_on_signals` 143 after
    SIGTERM."""
    try:
        ranks = Ranks.from_environment()
        rank, speaks = ranks.rank, ranks.local_rank == 0
    except ParNetError:  # which those will meet again that ask for their rank
        rank, speaks = 0, True
    if not sys.warnoptions:  # set once, and not by the threads that read pictures, for what Pillow mends or we tell
        warnings.filterwarnings("ignore", module=r"PIL\.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no run
    fault = ""
    try:
        status, fault = _ended(main, rank, speaks)
        leave_ranks()
        if fault and not speaks:  # rank 0 mostly says the same, and torchrun ends all ranks once the first has ended
            time.sleep(SILENCE_S)
            _say(fault)
    except Stopped as stopped:
        if fault:
            os._exit(status)
        _exit_at_once(128 + stopped.signal, f"rank {rank} was stopped by {stopped.signal.name}")
    sys.exit(status)


def _ended(main: Callable[[], int], rank: int, speaks: bool) -> tuple[int, str]:
    """A status to exit with and, where the input is at fault, the line that says so; said if this rank `speaks`."""
    try:
        status = main()
        _flush()
    except ParNetError as error:
        fault = f"error: {error}"
        if speaks:
            _say(fault)
        return 2, fault
    except LaneError as error:
        _exit_at_once(1, f"error on rank {rank}: {error}")
    except KeyboardInterrupt:
        return 130, ""
    except BrokenPipeError:
        os._exit(128 + SIGPIPE)  # as a program ends whose reader, such as head, has enough; nothing more can be printed
    except OSError as error:
        if error.errno not in (ENOSPC, EBADF) or error.filename is not None:
            _exit_at_once(1, f"{traceback.format_exc()}error on rank {rank}: {type(error).__name__}: {error}")
        _say(f"error: standard output: {error.strerror}")  # it is closed, or its disk is full
        os._exit(1)
    except Exception as error:
        if wanted := _lacking_memory(error):
            _exit_at_once(2, f"error on rank {rank}: out of memory: {wanted}; smaller pictures or batches need less")
        _exit_at_once(1, f"{traceback.format_exc()}error on rank {rank}: {type(error).__name__}: {error}")
    return status, ""


def _lacking_memory(error: Exception) -> str:
    """What an error says of memory that there is not; nothing for any other error. torch has no type of its own for
    that of CPUs."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return str(error).partition("\n")[0] or "none is left"
    return str(error).partition("DefaultCPUAllocator: can't allocate memory: ")[2].partition(".")[0]


def _exit_at_once(status: int, message: str) -> NoReturn:
    """Without leaving the ranks in order, which would wait for the others."""
    _say(message)
    _flush()
    if monitor := health.current():
        monitor.fence()
    os._exit(status)


def _flush() -> None:
    if sys.stdout is not None:  # as below
        sys.stdout.flush()


def _say(message: str) -> None:
    """In one write, so that lines of ranks that share stderr stay whole also where PYTHONUNBUFFERED is set."""
    if sys.stderr is not None:  # as it is where it was closed before the start
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
