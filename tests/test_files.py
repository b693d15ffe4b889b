"""Files are whole or as they were, with the permissions that they should have; and what cannot be written is told."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest

from parallel_parnet import ParNetError
from parallel_parnet.files import check_writable, write_atomically


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


def test_two_names_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with pytest.raises(ParNetError, match="named twice"):
        check_writable(tmp_path / "new", None, tmp_path / "link")
    check_writable("/dev/null", "/dev/null", tmp_path / "new", tmp_path / "newer")


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
