"""torchrun and its ranks as real processes, forked from one that has imported everything: importing takes seconds.

In place of executing Python anew, a rank is a fork that runs the same worker; all else is torchrun's own: rendezvous,
environment, signals, restarts, its report.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import TimeoutExpired
from time import monotonic, sleep
from typing import NoReturn

import worker
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

POLL_S = 0.005


class Forked:
    """As much of subprocess.Popen as torchrun uses."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run_and_exit(work)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else monotonic() + timeout
        while (status := self.poll()) is None:
            if end is not None and monotonic() > end:
                raise TimeoutExpired("a forked process", timeout or 0)
            sleep(POLL_S)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def start_torchrun(arguments: Sequence[str], environment: dict[str, str], log: Path) -> Forked:
    """torchrun with the worker as its script; what it and its ranks print goes to `log`."""

    def agent() -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ |= environment
        SubprocessHandler._popen = lambda handler, command, env: Forked(lambda: _rank(command, env))  # type: ignore
        torchrun.main(list(arguments))

    return Forked(agent)


def _rank(command: Sequence[str], environment: dict[str, str]) -> None:
    os.setsid()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ |= environment
    sys.argv = list(command[command.index("-u") + 1 :])
    worker.main()


def _run_and_exit(work: Callable[[], object]) -> NoReturn:
    """With the status and the output that a process of its own would have."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # whatever it is, a process of its own would end by it in this way
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
