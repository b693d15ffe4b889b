"""Shared by all tests: chance that can be repeated, poisoned memory, and scripts run as a user runs them.

TEST_SEED, which the last line of a run says, repeats its random numbers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forked import run_script
from parallel_parnet.commands import start
from parallel_parnet.executors.backends import ON_CPUS, has_bf16, lacking
from parallel_parnet.kernels.cpu.objects import runnable
from processes import free_port
from small import OPTIONAL

signal.signal(signal.SIGINT, signal.default_int_handler)  # else what tests start may inherit that it is ignored
ROOT = Path(__file__).resolve().parents[1]
# kept in the environment, where pytest-xdist's workers find it
SEED = int(os.environ.setdefault("TEST_SEED", str(random.SystemRandom().randrange(2**31))))
with torch.device("meta"):
    torch.empty(0)  # torch notes once what makes tensors: before `_poison` puts something else in its place


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """One test after the other to whichever process is free; but those of packaging to one, whose wheel is then made
    once. (That is what xdist_group is for, which xdist 3.8 does not see under pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class OneByOne(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "packaging" if "test_packaging.py::" in nodeid else nodeid

    return OneByOne(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With what it ran: an instruction set that a machine lacks hides what would fail with it."""
    sets = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, bf16 {'yes' if has_bf16() else 'no'}"
    if "native" in OPTIONAL:
        sets += f", kernels {' '.join(runnable())}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "numpy") if is_installed(name))
    terminalreporter.write_line(
        f"on {sets}; Python {platform.python_version()}, {versions}; without: {lacks()}; TEST_SEED={SEED}"
    )


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def lacks() -> str:
    """Executors that cannot be had here, and why."""
    return "; ".join(f"{name}, {reason}" for name in ON_CPUS if (reason := lacking(name))) or "nothing"


def chance(node: pytest.Collector | pytest.Item) -> int:
    """Sets torch's and Python's: fresh for every run, another for every test, repeated by TEST_SEED."""
    seed = random.Random(f"{SEED} {node.nodeid}").randrange(2**31)
    torch.manual_seed(seed)
    random.seed(seed)
    return seed


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What modules draw as they are imported."""
    chance(collector)


@pytest.fixture(autouse=True)
def _chance(request: pytest.FixtureRequest) -> int:
    return chance(request.node)


@pytest.fixture
def seed(_chance: int) -> int:
    """For what draws by a generator of its own, or in another process."""
    return _chance


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty gives with NaN, so that a value nobody wrote is seen."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        real = tensor.is_floating_point() and tensor.device.type != "meta"
        return tensor.fill_(float("nan")) if real else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Each test ends with as many threads as it began with: the last bits of an answer depend on how many there are."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _one_core() -> Iterator[None]:
    """This process and those that it starts on one core, so that their threads do not wait for other tests'."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess]:
    """A command in this process, for what ends before it does anything: a process of its own takes seconds to start."""

    def called(command: str, *arguments: object) -> subprocess.CompletedProcess:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            start(command)
        return subprocess.CompletedProcess(command, end.value.code or 0, *capsys.readouterr())

    return called


@dataclass(frozen=True)
class TracedRun:
    """What three ranks of launch/infer.py left behind.

    nsys: the command line that a stand-in for nsys was given in each rank. ranges: what NVTX told a listener in each
    rank; None where no C compiler could make the listener.
    """

    folder: Path
    output: str
    nsys: list[list[str]]
    ranges: list[list[str]] | None

    @property
    def trace(self) -> Path:
        return self.folder / "trace.json.gz"


@pytest.fixture(scope="session")
def traced_run(tmp_path_factory: pytest.TempPathFactory) -> TracedRun:
    """One real run with three ranks, through launch/profile.py nsys. The nsys on its PATH notes what it is told, and
    runs the program."""
    folder = tmp_path_factory.mktemp("traced")
    nsys = folder / "bin" / "nsys"
    nsys.parent.mkdir()
    nsys.write_text(f"#!{sys.executable}\n{STAND_IN}")
    nsys.chmod(0o755)
    command = [sys.executable, str(ROOT / "launch" / "profile.py"), "nsys", "--output", str(folder), "--"]
    command += [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", f"--master-port={free_port()}"]
    command += [str(ROOT / "launch" / "infer.py"), "--device", "cpu", "--executor", "eager", "--iterations", "3"]
    command += ["--report", str(folder / "report.html")]
    path = f"{nsys.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    listens = shutil.which("cc") is not None
    if listens:
        library, source = folder / "listener.so", ROOT / "tests" / "profiling" / "fixtures" / "nvtx_listener.c"
        subprocess.run(["cc", "-D_GNU_SOURCE", "-shared", "-fPIC", "-o", library, source], check=True)
        environment |= {"NVTX_INJECTION64_PATH": str(library), "NVTX_LISTENER_FILE": str(folder / "ranges")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [(folder / f"rank{rank}.told").read_text().splitlines() for rank in range(3)]
    ranges = [(folder / f"ranges.{rank}").read_text().splitlines() for rank in range(3)] if listens else None
    return TracedRun(folder, run.stdout, lines, ranges)


STAND_IN = """import os, pathlib, sys
output = next(word for word in sys.argv if word.startswith("--output=")).removeprefix("--output=")
file = pathlib.Path(output.replace("%q{RANK}", os.environ.get("RANK", "?")) + ".told")
file.write_text("\\n".join(sys.argv))
rest = next(i for i, word in enumerate(sys.argv) if i > 1 and not word.startswith("-"))
os.execvp(sys.argv[rest], sys.argv[rest:])
"""


def launch(
    script: str | Path, *args: object, ranks: int = 0, cwd: Path = ROOT, timeout: float = 240,
    environment: Mapping[str, str] | None = None, anew: bool = False, status: int = 0,
) -> subprocess.CompletedProcess:  # fmt: skip
    """Run a launch script to its end with the status: with python, or by torchrun with so many ranks, as in the README.

    environment: variables beside this process's own. anew: Python is executed, by each rank too,
    which takes seconds, and reads variables of its own such as PYTHONIOENCODING.
    """
    path, words = ROOT / "launch" / script, [str(arg) for arg in args]
    options = [f"--nproc-per-node={ranks}", f"--master-port={free_port()}"] if ranks else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    if anew:
        torchrun = ["-m", "torch.distributed.run", *options] if ranks else []
        command = [sys.executable, *torchrun, str(path), *words]
        run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    else:
        run = run_script(path, words, options, cwd, environment, timeout)
    assert run.returncode == status, run.stdout + run.stderr
    return run


def in_python(code: str, folder: Path, **options: Any) -> subprocess.CompletedProcess:
    """Code, with the package at hand, to its end as `launch` runs a script; it is written to the folder."""
    script = folder / "code.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    return launch(script, **options)


def answered(file: Path, *words: object, **options: Any) -> tuple[dict, str]:
    """What infer.py answers, by way of the file, and what it prints."""
    run = launch("infer.py", *words, "--json", file, **options)
    return json.loads(file.read_text()), run.stdout
