"""How a command ends: with its status, and where it cannot go on with one line that says why."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from errno import EBADF, ENOSPC
from io import TextIOWrapper
from signal import SIGPIPE
from typing import NoReturn

import torch

from parallel_parnet import LaneError, ParNetError
from parallel_parnet.transport import health, leave_ranks

from .ranks import Ranks
from .stopping import Stopped

SILENCE_S = 5.0  # of ranks that have an error, before they say it themselves


def run(main: Callable[[], int]) -> None:
    """Exit with main's status: 2 and one line on stderr, from one rank of each machine, where the input is at fault;
    1 where another rank was lost or the program itself failed; 130 after SIGINT; with `stop_on_signals` 143 after
    SIGTERM and 129 after SIGHUP."""
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
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (ENOSPC, EBADF) and error.filename is None:
            _say(f"error: standard output: {error.strerror}")  # it is closed, or its disk is full
            os._exit(1)
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
    try:
        if sys.stderr is not None:  # as it is where it was closed before the start
            sys.stderr.write(f"{message}\n")
            sys.stderr.flush()
    except OSError:  # its disk is full, or its terminal gone: the status still says how the command ended
        sys.stderr = None  # else Python would try again at its end, and make the status 120
