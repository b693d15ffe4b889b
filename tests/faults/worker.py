"""launch/infer.py with one fault in one rank: the product's own code, and a hook on one function at a phase's start.

Run by torchrun in place of launch/infer.py, with the fault as JSON in FAULT. What happens is noted in the fault's
folder: a rank's process as "pid.<generation>.<rank>", the moment of the fault (time.monotonic) as "injected". Faults
happen in the first generation alone; torchrun's restarts run undisturbed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from parallel_parnet.commands import ending  # noqa: E402
from parallel_parnet.commands.infer import command as infer  # noqa: E402
from parallel_parnet.commands.infer import lines  # noqa: E402
from parallel_parnet.executors import distributed  # noqa: E402
from parallel_parnet.executors.lane import Lane  # noqa: E402
from parallel_parnet.transport import health  # noqa: E402

PAUSE_S = 0.2  # of the writer in the middle of a line, for another rank's fault to happen
POLL_S = 0.001


@dataclass(frozen=True)
class Fault:
    """kind: a signal's name, "exception", "dropped socket", or "leak", in every generation. after: answers written
    before a fault in steady state; bytes that a leak keeps of each request."""

    kind: str
    phase: str
    rank: int
    seed: int
    after: int
    notes: str

    def note(self, name: str, content: object = "") -> None:
        """Leave a note, whole when it is seen."""
        part = Path(self.notes) / f"part.{name}"
        part.write_text(str(content))
        part.rename(part.with_name(name))

    def inject(self) -> None:
        """Let it happen in this process, now."""
        self.note("injected", time.monotonic())
        if self.kind == "exception":
            raise RuntimeError("injected")
        if self.kind == "dropped socket":
            drop_sockets(random.Random(self.seed))
        else:
            os.kill(os.getpid(), getattr(signal, self.kind))

    def dumps(self) -> str:
        return json.dumps(asdict(self))


def drop_sockets(rng: random.Random) -> None:
    """Shut down all connections to other ranks, or one of them; that to torchrun's store stays."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(entry)))
        except OSError:
            continue  # no socket, or closed meanwhile
        if is_to_a_rank(connection):
            found.append(connection)
        else:
            connection.close()
    for connection in found if rng.random() < 0.5 else rng.sample(found, min(1, len(found))):
        connection.shutdown(socket.SHUT_RDWR)


def is_to_a_rank(connection: socket.socket) -> bool:
    """Whether it is a TCP connection, and not torchrun's."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return False
    try:
        return connection.getpeername()[1] != int(os.environ["MASTER_PORT"])
    except OSError:
        return False  # it listens, or is gone


def before(owner: type | ModuleType, name: str, action: Callable[[], None]) -> None:
    """Do something each time before `owner.name` runs."""
    original = getattr(owner, name)

    def hooked(*args: object, **kwargs: object) -> object:
        action()
        return original(*args, **kwargs)

    setattr(owner, name, hooked)


def once_when(condition: Callable[[], bool], fault: Fault) -> None:
    """The fault as soon as the condition holds: at any point of the main thread, an exception at its next request."""
    due = threading.Event()

    def watch() -> None:
        while not condition():
            time.sleep(POLL_S)
        if fault.kind == "exception":
            due.set()
        else:
            fault.inject()

    before(Lane, "finish", lambda: fault.inject() if due.is_set() else None)  # once in each request
    threading.Thread(target=watch, daemon=True).start()


def half_a_line(fault: Fault, rank: int) -> None:
    """Rank 0 writes one line in two halves; between them the fault happens, here or in the other rank."""
    write, count = os.write, 0

    def halves(file: int, data: bytes) -> int:
        nonlocal count
        count += data.startswith(lines.START)
        if count != fault.after or not data.startswith(lines.START):
            return write(file, data)
        half = write(file, data[: len(data) // 2])
        if rank == fault.rank:
            fault.inject()
        else:
            fault.note("half")
            time.sleep(PAUSE_S)
        return half

    lines.os = _OsWith(halves)  # type: ignore[assignment]


class _OsWith:
    """The module os with another `write`."""

    def __init__(self, write: Callable[[int, bytes], int]) -> None:
        self.write = write

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)


def arm(fault: Fault, rank: int, output: Path) -> None:
    """Prepare this rank for the fault, or for helping it happen in another."""
    mine = rank == fault.rank
    if fault.phase == "write" and rank == 0:
        half_a_line(fault, rank)
    elif fault.phase == "write" and mine:
        once_when((Path(fault.notes) / "half").exists, fault)
    elif not mine:
        return
    elif fault.phase == "start":
        before(*((infer, "load_model") if fault.seed % 2 else (health, "start")), fault.inject)
    elif fault.phase == "handshake":
        before(distributed, "agree", fault.inject)
    elif fault.phase == "steady":
        once_when(lambda: output.exists() and output.read_bytes().count(b"\n") >= fault.after, fault)
    else:
        before(ending, "leave_ranks", fault.inject)


def main() -> None:
    """Note this process, arm it, and run launch/infer.py's main."""
    fault = Fault(**json.loads(os.environ["FAULT"]))
    rank, generation = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    fault.note(f"pid.{generation}.{rank}", os.getpid())
    if fault.kind == "leak" and rank == fault.rank:
        kept: list[bytes] = []
        before(Lane, "finish", lambda: kept.append(os.urandom(fault.after)))
    elif generation == 0 and fault.kind not in ("none", "leak"):
        arm(fault, rank, Path(sys.argv[sys.argv.index("--jsonl") + 1]))
    ending.run(infer.main)


if __name__ == "__main__":
    main()
