"""C compiled for this machine when it is first needed, and kept: whole, and where nobody else can put code."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...errors import ParNetError
from ...files import write_atomically

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
TARGET = ("-march=native", "-E", "-dM", "-x", "c", os.devnull)  # names every instruction set
PATIENCE = 120  # seconds for each call of the compiler


def load(source: Path) -> ctypes.CDLL:
    """The library of a C file: as kept, or compiled by `CC` (cc where not set). ParNetError, saying why, where that
    fails.

    A file's name has the hash of all that it was made from, and that of its own content, so damage is seen before the
    loader maps it. Where no folder can keep it, it is compiled for this process alone.
    """
    try:
        compiler = shlex.split(os.environ.get("CC", "cc"))
    except ValueError as error:
        raise ParNetError(f"CC={os.environ['CC']}: {error}; set it to a C compiler") from None
    if not compiler or shutil.which(compiler[0]) is None:
        raise ParNetError("no C compiler: install gcc, or set CC")
    try:
        made_from = [
            _run(*compiler, "--version"),
            _run(*compiler, *TARGET),
            repr(FLAGS),
            *(p.read_text("utf-8") for p in sorted(source.parent.glob("*.[ch]"))),
        ]
        name = f"{source.stem}-{_hash(''.join(made_from).encode())}"
        for folder in _folders():
            if library := _found(folder, name):
                return library
        with tempfile.TemporaryDirectory(prefix="parallel_parnet-") as private:
            made = Path(private) / f"{name}.so"
            _run(*compiler, *FLAGS, "-o", str(made), str(source))
            for folder in _folders():
                if library := _kept(folder, name, made.read_bytes()):
                    return library
            return ctypes.CDLL(str(made))
    except subprocess.SubprocessError as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        line = (said or str(error)).splitlines()[0]
        raise ParNetError(f"{shlex.join(compiler)} could not compile {source.name}: {line}") from None
    except OSError as error:
        raise ParNetError(f"{source.name}, by {shlex.join(compiler)}: {error}") from None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _folders() -> Iterator[Path]:
    """Where a library may be kept: the user's cache, unless there is none; a folder of the user's beside others'."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    cache = cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")
    if os.path.isabs(cache):  # else nobody knows a home, and "~" would become a folder here
        yield Path(cache) / "parallel_parnet"
    yield Path(tempfile.gettempdir()) / f"parallel_parnet-{os.getuid()}"


def _trusted(folder: Path) -> bool:
    """Whether it is a folder that this user alone may write to: what lies in it will be run."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _found(folder: Path, name: str) -> ctypes.CDLL | None:
    with suppress(OSError):  # it is not there, or nothing in it may be read or run: another folder may do
        for path in folder.glob(f"{name}-*.so") if _trusted(folder) else ():
            if path.name == f"{name}-{_hash(path.read_bytes())}.so":
                return ctypes.CDLL(str(path))
    return None


def _kept(folder: Path, name: str, content: bytes) -> ctypes.CDLL | None:
    with suppress(OSError, ParNetError):  # it cannot be made or written, or is full: likewise
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _trusted(folder):
            path = folder / f"{name}-{_hash(content)}.so"
            write_atomically(path, content)
            return ctypes.CDLL(str(path))
    return None


def _run(*command: str) -> str:
    """What it prints. With it end its children, which would keep the pipes open for who waits at them."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            output, said = process.communicate(timeout=PATIENCE)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output, said.strip())
    return output
