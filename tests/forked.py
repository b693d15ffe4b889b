"""Scripts in processes of their own that start at once: forks of one that has imported torch, which takes seconds.

It has imported what others wrote, and computed nothing; the package is imported by each script, as in a process that
executes Python. What they all share is the order in which Python hashes text: where ranks could disagree by that, start
them with `conftest.launch(..., anew=True)`. And work in a fork of the process that tests run in.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import TimeoutExpired
from time import monotonic, sleep
from typing import NoReturn
from unittest import mock

POLL_S = 0.005
ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}  # read with torch: none is there to be lost in a fork
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch.distributed.run", "PIL.Image", "rich.console"])


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


def run_script(
    script: Path, arguments: Sequence[str], ranks: Sequence[str], cwd: Path, environment: Mapping[str, str],
    timeout: float,
) -> subprocess.CompletedProcess:  # fmt: skip
    """What subprocess.run gives for a script; `ranks` are torchrun's options, and none start it without torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "stdout", Path(folder) / "stderr"
        process = start_script(script, arguments, ranks, cwd, environment, files)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutExpired([str(script), *arguments], timeout)
        return subprocess.CompletedProcess(script, process.exitcode, *(file.read_text() for file in files))


def start_script(
    script: Path, arguments: Sequence[str], ranks: Sequence[str], cwd: Path, environment: Mapping[str, str],
    files: tuple[Path, Path],
) -> BaseProcess:  # fmt: skip
    """One that runs, and writes its standard output and error to these files."""
    work = _torchrun if ranks else _script
    process = SERVER.Process(target=_apart, args=(work, [*ranks, str(script), *arguments], cwd, environment, files))
    with mock.patch.dict(os.environ, ONE_THREAD):
        process.start()
    return process


def in_a_fork(work: Callable[[], str]) -> str:
    """What `work` gives in a forked child, which is ended where it hangs."""
    read, write = os.pipe()
    gc.collect()  # what other tests left would, if the child collected it, wait there for threads that a fork lacks
    child = os.fork()
    if child == 0:
        gc.disable()
        signal.alarm(60)
        try:
            os.write(write, work().encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the child hung or died"
    return said


def _apart(
    work: Callable[[Sequence[str]], object], words: Sequence[str], cwd: Path, environment: Mapping[str, str],
    files: tuple[Path, Path],
) -> None:  # fmt: skip
    """In the fork: what executing Python would set, then the work."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= environment
    sys.path = [path for path in sys.path if Path(path).is_relative_to(sys.prefix) or not _is_ours(Path(path))]
    work(words)


def _is_ours(path: Path) -> bool:
    """Whether it is where the tests look for modules, and no script does."""
    return path.resolve().is_relative_to(ROOT)


def _torchrun(words: Sequence[str]) -> None:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda handler, command, env: Forked(partial(_rank, command, env))  # type: ignore
    torchrun.main(list(words))


def _rank(command: Sequence[str], environment: Mapping[str, str]) -> None:
    as_a_process_of_torchrun(environment)
    _script(command[command.index("-u") + 1 :])


def as_a_process_of_torchrun(environment: Mapping[str, str]) -> None:
    """In a fork of torchrun: a session and an environment of its own, and none of its files."""
    os.setsid()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ |= environment


def _script(words: Sequence[str]) -> None:
    sys.argv = list(words)
    sys.path.insert(0, str(Path(words[0]).resolve().parent))  # as executing Python does
    runpy.run_path(words[0], run_name="__main__")


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
