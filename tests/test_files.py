"""Files are whole or as they were, with the permissions that they should have; and what cannot be written is told."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open

from conftest import ROOT
from parallel_parnet import ParNetError, Program, fold, load_checkpoint, save_checkpoint
from parallel_parnet.files import check_writable, write_atomically, write_csv, write_safetensors


def test_permissions_are_those_of_the_file_that_was_there_else_of_the_process(tmp_path: Path) -> None:
    (private := tmp_path / "private").touch(0o600)
    longest = tmp_path / ("n" * 255)
    before = os.umask(0o027)
    try:
        for path in (private, longest):
            write_atomically(path, "told")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (private, longest)] == [0o600, 0o640]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=error))
    with pytest.raises((KeyboardInterrupt, ParNetError)):
        write_atomically(tmp_path / "a", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_what_is_on_the_disk_before_the_name_is_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in a buffer, which a power cut loses with the file that was there before."""
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    write_atomically(tmp_path / "a", "new")
    assert sizes == [3]


def test_a_killed_write_leaves_nothing(tmp_path: Path) -> None:
    """As a trainer that is preempted does, thousands of times; where the file system has files without names."""
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY))
    except OSError:
        pytest.skip("no O_TMPFILE here")
    code = "import os; os.fsync = lambda _: os.kill(os.getpid(), 9); from parallel_parnet import files as f"
    command = [sys.executable, "-c", f"{code}; f.write_atomically({str(tmp_path / 'a')!r}, 'new')"]
    assert subprocess.run(command, cwd=ROOT).returncode == -9
    assert not [*tmp_path.iterdir()]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """They are escaped where they are written, and said to be at fault where a library cannot open them."""
    strange = os.fsdecode(b"\xff.png")
    write_csv(tmp_path / "a.csv", [{"image": strange}])
    assert (tmp_path / "a.csv").read_text("utf-8") == "image\n\\udcff.png\n"
    for name, read in (("parnet_fashion.safetensors", load_checkpoint), ("program.safetensors", Program.load)):
        path = tmp_path / os.fsdecode(b"\xff-" + name.encode())
        shutil.copy(ROOT / "launch" / "demo" / "parnet_fashion.safetensors", path)
        with pytest.raises(ParNetError, match="its name is no UTF-8, so that safetensors does not open it"):
            read(path)
    model, refused = load_checkpoint(ROOT / "launch" / "demo" / "parnet_fashion.safetensors"), tmp_path / strange
    for write in (
        fold(model).save,
        partial(save_checkpoint, model),
        lambda path: check_writable(f"{path}.safetensors"),
    ):
        with pytest.raises(ParNetError, match="its name is no UTF-8, so that safetensors does not open it"):
            write(refused)


def test_where_no_file_is_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", 1 << 30)
    write_atomically(tmp_path / "a", "told")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["told"]


@pytest.mark.parametrize("metadata", [{}, {name: name * 9 for name in "zyxwvutsrqponmlkji"}, {'\x7f\n"é': "\x00"}])
def test_equal_tensors_are_equal_bytes(metadata: dict[str, str], tmp_path: Path) -> None:
    tensors = {"one": torch.arange(5.0), "other": torch.ones(2, 3, dtype=torch.bfloat16), "é": torch.zeros(())}
    path = tmp_path / "a.safetensors"
    contents = set()
    for _ in range(9):
        write_safetensors(path, tensors, dict(random.sample([*metadata.items()], len(metadata))))
        contents.add(path.read_bytes())
    assert len(contents) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
        assert {*file.keys()} == {*tensors}


def test_two_names_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with pytest.raises(ParNetError, match="named twice"):
        check_writable(tmp_path / "new", None, tmp_path / "link")
    check_writable("/dev/null", "/dev/null", tmp_path / "new", tmp_path / "newer")


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link", "log"])
@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_standard_output_that_goes_to_a_file_is_not_replaced(name: str, mode: str, tmp_path: Path) -> None:
    """By a file of that name, which whoever writes to it would not see."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    path = str(tmp_path / name)
    code = f"from parallel_parnet import files as f; f.check_writable({path!r}); f.write_atomically({path!r}, 'x')"
    command = [sys.executable, "-c", code]
    (tmp_path / "log").write_text("precious")
    with open(tmp_path / "log", mode) as log:
        run = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.PIPE, text=True)
    assert run.returncode and "ParNetError" in run.stderr and "goes to that file" in run.stderr
    assert (tmp_path / "log").read_text() == ("precious" if mode == "ab" else "")
    if name != "log":
        assert subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout == b"x"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("absent/a.json", "no such folder"), (".", "a folder; name a file"), ("file/a.json", "Not a directory"),
        ("n" * 256, "File name too long"), ("/", "a folder; name a file"), ("a\0b", ".*null.*"),
        ("file", None), ("new", None), ("link", None), ("null", None),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_told_beforehand(name: str, why: str | None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    (tmp_path / "null").symlink_to("/dev/null")
    with pytest.raises(ParNetError, match=rf"cannot be written \({why}\)") if why else nullcontext():
        check_writable(tmp_path / name)
    with pytest.raises(ParNetError, match="cannot be written") if why else nullcontext():
        write_atomically(tmp_path / name, "told")
