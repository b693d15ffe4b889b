"""C that is compiled once and kept: damage, folders that will not do, and compilers that fail or hang."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import OPTIONAL
from parallel_parnet import ParNetError
from parallel_parnet.kernels.cpu import c_library

pytestmark = pytest.mark.skipif("native" not in OPTIONAL, reason="there is no C compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source to compile, in a world of its own: home, cache, a folder for temporary files, working folder."""
    for name in ("cache", "home", "temporary", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return 42; }\n")
    return source


def kept(source: Path) -> list[Path]:
    """All libraries, after one was loaded."""
    assert c_library.load(source).answer() == 42
    return sorted(source.parent.rglob("answer-*.so"))


def forbid_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    run = c_library._run
    monkeypatch.setattr(c_library, "_run", lambda *command: run(*command) if "-shared" not in command else 1 / 0)


def compiler(source: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source.with_name("compiler")
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))


@pytest.mark.parametrize("damage", [lambda whole: whole[:100], lambda whole: whole[:-1] + b"\x01", lambda whole: b""])
def test_a_damaged_library_is_compiled_anew_once(
    damage: Callable[[bytes], bytes], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as unmapped:  # a library that is damaged under who maps it ends the process
        unmapped.setattr(c_library.ctypes, "CDLL", lambda path: SimpleNamespace(answer=lambda: 42))
        (path,) = kept(source)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert kept(source) == [path] and path.read_bytes() == whole
    forbid_compiling(monkeypatch)
    assert kept(source) == [path]


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_to_is_not_trusted(
    mode: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (planted,) = kept(source)
    planted.parent.chmod(mode)
    planted.unlink()
    (path,) = kept(source)
    assert path.parent == source.parent / "temporary" / f"parallel_parnet-{os.getuid()}"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    forbid_compiling(monkeypatch)
    assert kept(source) == [path]


def test_nothing_is_loaded_from_somebody_elses_folders(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = kept(source)
    foreign = source.parent / "temporary" / "parallel_parnet-12345"
    foreign.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert kept(source) == [path], "compiled for this process alone"
    forbid_compiling(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        c_library.load(source)


def test_a_link_in_the_shared_folder_is_not_followed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))
    (source.parent / "temporary" / f"parallel_parnet-{os.getuid()}").symlink_to(source.parent / "home")
    assert kept(source) == []


def test_a_relative_cache_is_none(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    (path,) = kept(source)
    assert path.parent == source.parent / "home" / ".cache" / "parallel_parnet"
    assert list(Path.cwd().iterdir()) == []


def test_nobody_without_a_home(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    (path,) = kept(source)
    assert path.parent.parent.name == "temporary"
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("fault", ["file", "full", "noexec"])
def test_a_cache_that_cannot_be_used(fault: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, write, load = source.parent / "cache", c_library.write_atomically, c_library.ctypes.CDLL

    def full(path: Path, content: bytes) -> None:
        if cache in path.parents:
            raise ParNetError(f"{path}: cannot be written (No space left on device)")
        write(path, content)

    def noexec(path: str) -> object:
        if cache in Path(path).parents:
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    if fault == "file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(source))
    elif fault == "full":
        monkeypatch.setattr(c_library, "write_atomically", full)
    else:
        monkeypatch.setattr(c_library.ctypes, "CDLL", noexec)
    assert kept(source)[-1].parent.parent.name == "temporary"
    forbid_compiling(monkeypatch)
    kept(source)


def test_many_at_once(source: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        assert [library.answer() for library in threads.map(c_library.load, [source] * 8)] == [42] * 8
    assert len(kept(source)) == 1


@pytest.mark.parametrize(
    ("cc", "message"),
    [
        ('gcc "-O2', 'CC=gcc "-O2: No closing quotation; set it to a C compiler'),
        ("", "no C compiler"),
        ("no-such-compiler", "no C compiler"),
        ("false", r"false could not compile answer\.c: .* exit status 1"),
    ],
)
def test_what_is_no_compiler(cc: str, message: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", cc)
    with pytest.raises(ParNetError, match=message):
        c_library.load(source)


def test_what_compilers_say(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for script, message in (
        ("echo >&2; exit 1", "exit status 1"),
        ("printf '\\377 is wrong\\nand more\\n' >&2; exit 1", "answer.c: \ufffd is wrong$"),
        ("exit 0", "No such file"),
    ):
        compiler(source, script, monkeypatch)
        with pytest.raises(ParNetError, match=message) as error:
            c_library.load(source)
        assert "\n" not in str(error.value)
    source.with_name("compiler").write_text("no program")
    with pytest.raises(ParNetError, match="Exec format error"):
        c_library.load(source)


def test_a_compiler_that_hangs_ends_with_its_children(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(source, "sleep 300 & echo $! > child; wait", monkeypatch)
    monkeypatch.setattr(c_library, "PATIENCE", 0.5)
    began = time.monotonic()
    with pytest.raises(ParNetError, match=r"timed out after 0\.5 seconds"):
        c_library.load(source)
    state = Path("/proc") / Path("child").read_text().strip() / "stat"
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() - began < 5
