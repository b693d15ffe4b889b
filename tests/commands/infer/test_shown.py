"""What launch/infer.py shows, on whatever it has to be shown."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT, in_python
from parallel_parnet import ParNetError, fold, load_checkpoint
from parallel_parnet.commands.common import plain_console
from parallel_parnet.commands.ending import run
from parallel_parnet.commands.infer.tables import read_labels, show_predictions
from parallel_parnet.commands.quantize import command as quantize
from parallel_parnet.preprocess import read_image

DEMO = ROOT / "launch" / "demo"
QUICK = ("--device", "cpu", "--iterations", 3, "--warmup", 1)


@pytest.mark.parametrize("columns", ["²", "9" * 5000, "9" * 12, "0", "-1", "wide", ""], ids=lambda value: value[:12])
def test_a_terminal_of_any_width(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    assert 1 <= plain_console(file=StringIO()).width <= 10_000


def test_names_are_no_markup() -> None:
    written = StringIO()
    top5 = [{"label": label, "index": i, "probability": 0.2} for i, label in enumerate(("[/b]", "[red]x", ":dog:"))]
    show_predictions([{"image": "a [i].png", "top5": top5}], plain_console(file=written, width=100))
    assert all(name in written.getvalue() for name in ("[/b]", "[red]x", ":dog:", "a [i].png"))


@pytest.mark.parametrize("width", [30, 60, 200])
def test_a_narrow_terminal_cuts_no_name(width: int) -> None:
    """It has fewer classes of each picture, whole."""
    written = StringIO()
    top5 = [{"label": f"class number {i}", "index": i, "probability": 0.2} for i in range(5)]
    show_predictions([{"image": "a-picture.png", "top5": top5}], plain_console(file=written, width=width))
    lines = written.getvalue().splitlines()
    shown = sum(f"class number {i} 20.0%" in written.getvalue() for i in range(5))
    assert shown == {30: 0, 60: 1, 200: 5}[width]
    assert lines[0].startswith(f"Top {max(shown, 1)}, with probabilities") and "\u2026" not in written.getvalue()
    assert max(map(len, lines)) <= width


def test_labels_as_editors_save_them(tmp_path: Path) -> None:
    names = [f"[{i}] \u00e9" for i in range(10)]
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*names, "", ""]).encode())
    program = fold(load_checkpoint(DEMO / "parnet_fashion.safetensors"))
    assert read_labels(tmp_path / "labels.txt", program) == names


def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    shutil.copy(DEMO / "pictures" / "7-sneaker.png", tmp_path / "\u9774\u5b50.png")
    arguments = ["infer.py", *map(str, QUICK), "--image", str(tmp_path)]
    code = f"sys.stdout.reconfigure(encoding='ascii', errors='strict'); sys.argv = {arguments}; start('infer')"
    assert "Sneaker" in in_python(f"from parallel_parnet.commands import start; {code}", tmp_path).stdout


@pytest.mark.parametrize(
    ("sink", "status"), [("| true", {141}), ("| head -1", {0, 141}), ("> /dev/full", {1}), (">&-", {0, 1})]
)
def test_standard_output_that_takes_nothing_more(sink: str, status: set[int], tmp_path: Path) -> None:
    command = f"{sys.executable} {ROOT / 'launch' / 'infer.py'} --device cpu --iterations 3 --json {tmp_path / 'j'}"
    run = subprocess.run(
        ["bash", "-c", f"{{ {command}; echo status $? >&2; }} {sink}"],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert int(run.stderr.split()[-1]) in status, run.stderr
    assert "Traceback" not in run.stderr
    assert json.loads((tmp_path / "j").read_text())["predictions"], (
        "who reads a page's first line wants all of the file"
    )


def test_the_list_of_commands_where_nothing_more_is_taken() -> None:
    command = f"{sys.executable} -m parallel_parnet > /dev/full"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (run.returncode, run.stderr) == (1, "error: standard output: No space left on device\n")


@pytest.mark.parametrize(
    ("words", "sink"),
    [
        ("-m parallel_parnet infre", "2>&-"), ("launch/infer.py --model absent", "2>/dev/full"),
        ("-S launch/infer.py", "2>&-"), ("-S launch/infer.py", "2>/dev/full"),
    ],
)  # fmt: skip
def test_the_status_of_wrong_input_where_no_error_can_be_told(words: str, sink: str) -> None:
    run = subprocess.run(["bash", "-c", f"{sys.executable} {words} {sink}"], capture_output=True, timeout=120, cwd=ROOT)
    assert (run.returncode, run.stdout, run.stderr) == (2, b"", b"")


def test_a_table_of_errors_without_a_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    program = fold(load_checkpoint(DEMO / "parnet_fashion.safetensors"))
    monkeypatch.setattr(sys, "stdout", None)
    quantize.show(program, {}, 0.1, (), "int8")


def test_an_interrupt_of_what_is_imported_is_quiet(tmp_path: Path) -> None:
    """It takes a second or two before a command has begun."""
    (tmp_path / "torch.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, ROOT / "launch" / "infer.py"], env=environment, capture_output=True, timeout=60
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, b"", b"")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_rank_tells_how_a_command_is_used(rank: str, here: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    run = here("infer", "--help")
    assert run.returncode == 0 and ("--image" in run.stdout) == (rank == "0")


def test_an_error_without_a_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has none where it was closed before the start. The status still says whose fault it is."""

    def refuse() -> int:
        raise ParNetError("no such thing")

    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as end:
        run(refuse)
    assert end.value.code == 2


def test_damage_that_is_mended_is_not_talked_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a command, whose process is its own; whoever calls the package has his own filters."""
    Image.new("RGB", (64, 64)).save(tmp_path / "p.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        read_image(tmp_path / "p.jpg")
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit) as end:
            run(lambda: read_image(tmp_path / "p.jpg").size[0])
    assert end.value.code == 64 and not said
