"""torchrun and its ranks as forks of one process that has imported everything: in place of executing Python anew, a
rank runs the same worker; all else is torchrun's own: rendezvous, environment, signals, restarts, its report."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import worker
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

from forked import Forked, as_a_process_of_torchrun


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
    as_a_process_of_torchrun(environment)
    sys.argv = list(command[command.index("-u") + 1 :])
    worker.main()
