"""Files that a command cannot read or write, and numbers that are none: one line says so, before any work is done."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import in_python
from parallel_parnet import ParNetError
from parallel_parnet.commands.data.finding import open_split
from parallel_parnet.commands.data.split import TEST
from parallel_parnet.commands.infer.lines import AnswerLines
from parallel_parnet.commands.locking import held

LONG = "n" * 300


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("infer", "--checkpoint", LONG), "no such checkpoint"),
        (("infer", "--image", LONG), "no such file or folder"),
        (("infer", "--dtype", "int8", "--calibrate", f"{LONG}.json"), "File name too long"),
        (("validate", LONG), "no such folder"),
        (("quantize", LONG), "no such file or folder"),
        (("train", "tests", "--out", "o.safetensors", "--recipe", LONG), "give a file, or one of"),
        (("bench", "--out", LONG), "no such folder"),
        (("throughput", "--page", LONG), "no such file"),
        (("versus", "--page", LONG), "no such file"),
        (("plan-check", "--json", "--page", LONG), "a page that there is"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value[:3]).replace(LONG, "LONG"),
)
def test_names_that_no_file_can_have(words: tuple[str, ...], says: str, here: Callable) -> None:
    run = here(*words)
    assert run.returncode == 2 and says in run.stderr and run.stderr.count("\n") == 1, run.stderr


@pytest.mark.parametrize("wanted", ["torch.empty(2**58)", "bytearray(2**60)"])
def test_memory_that_there_is_not(wanted: str, tmp_path: Path) -> None:
    """In one line, as what was asked for is at fault and no code; any other RuntimeError has its traceback."""
    code = "import torch; from parallel_parnet.commands.ending import run; run(lambda: {})"
    said = in_python(code.format(wanted), tmp_path, status=2).stderr
    assert said.startswith("error on rank 0: out of memory") and said.count("\n") == 1
    assert "Traceback" in in_python(code.format("torch.empty(2).view(3)"), tmp_path, status=1).stderr


@pytest.mark.parametrize(
    "words",
    [
        ("infer", "--json", ""), ("infer", "--trace", ".json"), ("infer", "--report", ".html"),
        ("infer", "--measure-links", "--json", ""), ("validate", "absent", "--results-file", ".csv"),
        ("quantize", "absent", "--out", ".json"), ("quantize", "absent", "--results-file", ".json"),
        ("train", "absent", "--out", ".safetensors"), ("train", "absent", "--out", "o.safetensors", "--log", ""),
        ("train", "absent", "--out", "o.safetensors", "--curve", ""), ("versus", "--json", ""),
        ("plan", "--json", ""), ("plan", "--figure", ".svg"), ("plan-check", "--json", ""), ("export", "--onnx", ""),
        ("compile-report", "--json", ""), ("tune", "--out", ""), ("profile", "report", "absent", "--report", ".html"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_cannot_be_written(words: tuple[str, ...], here: Callable) -> None:
    """With the name that fails wherever it is asked about; others are test_files.py's."""
    *before, ending = words
    run = here(*before, f"{LONG}{ending}")
    assert run.returncode == 2 and "cannot be written" in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert not run.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("infer", "--checkpoint", "READ", "--json", "READ"), ("infer", "--image", "READ", "--json", "READ"),
        ("infer", "--labels", "READ", "--report", "READ.html"), ("export", "--checkpoint", "READ", "--onnx", "READ"),
        ("quantize", "absent", "--checkpoint", "READ.json", "--out", "READ.json"),
        ("validate", "absent", "--checkpoint", "READ.csv", "--results-file", "READ.csv"),
        ("train", "absent", "--checkpoint", "READ.safetensors", "--out", "READ.safetensors"),
        ("plan", "--checkpoint", "READ", "--json", "READ"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_is_read_is_not_written(words: tuple[str, ...], tmp_path: Path, here: Callable) -> None:
    for name in ("READ", "READ.csv", "READ.html", "READ.json", "READ.safetensors"):
        (tmp_path / name).write_text("kept")
    (tmp_path / "READ.html").unlink()
    (tmp_path / "READ.html").symlink_to("READ")  # which is the same file
    run = here(*(str(tmp_path / word) if word.startswith("READ") else word for word in words))
    assert run.returncode == 2 and "is read as well" in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert {path.read_text() for path in tmp_path.iterdir()} == {"kept"}


@pytest.mark.parametrize("path", [".", "/", "..", ""])
@pytest.mark.parametrize(
    "words", [("train", "absent", "--out", "o.safetensors", "--curve"), ("validate", "absent", "--resume")]
)
def test_names_from_which_none_can_be_made(words: tuple[str, ...], path: str, here: Callable) -> None:
    run = here(*words, path)
    assert run.returncode == 2 and f"argument {words[-1]}: {path!r} has no name of its own" in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["bench", "throughput", "latency-vs-depth"])
def test_a_folder_that_is_not_ones_own(
    command: str, tmp_path: Path, here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before anything is measured; root may write everywhere, so it is only said to be so."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    run = here(command, "--out", tmp_path)
    assert run.returncode == 2 and f"--out {tmp_path}: cannot be written" in run.stderr


def test_one_name_for_two_files(here: Callable) -> None:
    for words in (
        ("infer", "--json", "a.json", "--trace", "a.json"), ("infer", "--jsonl", "a", "--json", "./a"),
        ("export", "--onnx", "a", "--pt2", "./a"),
        ("quantize", "absent", "--out", "a.json", "--results-file", "a.json"),
        ("plan", "--json", "a.svg", "--figure", "a.svg"),
    ):  # fmt: skip
        run = here(*words)
        assert run.returncode == 2 and "named twice" in run.stderr, run.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "--budget", "nan"), ("bench", "--budget", "inf"), ("bench", "--budget", "1e300"),
        ("throughput", "--budget", "nan"), ("versus", "--budget", "inf"), ("plan", "--efficiency", "nan"),
        ("infer", "--timeout", "nan"), ("validate", "absent", "--timeout", "inf"), ("gpu-check", "--seconds", "nan"),
        ("tune", "--minutes", "nan"), ("train", "absent", "--out", "o.safetensors", "--timeout", "inf"),
        ("train", "absent", "--lr", "nan"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_numbers_that_no_limit_catches(words: tuple[str, ...], here: Callable) -> None:
    run, (*_, option, number) = here(*words), words
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert f"argument {option}: {number}: give a number of at most 2147483647" in run.stderr


@pytest.mark.parametrize("command", ["validate", "quantize"])
def test_a_size_is_refused_before_pictures_are_looked_for(command: str, here: Callable) -> None:
    assert "picture size 48 x 48" in here(command, "absent", "--img-size", 48).stderr


def test_a_folder_that_must_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(ParNetError, match=rf"{tmp_path}: cannot be read \(Permission denied\)"):
        open_split(tmp_path, TEST)


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which says so, and leaves nothing behind."""

    def flock(file: int, operation: int) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path / "a"):
        pass
    said = capsys.readouterr().err
    assert f"{tmp_path / 'a'}: no lock to be had there ({os.strerror(reason)})" in said and said.count("\n") == 1
    with AnswerLines(tmp_path / "b", "settings") as lines:
        lines.append("a.png", {})
    assert f"{tmp_path / 'b'}: no lock" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
