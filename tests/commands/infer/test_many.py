"""A stream of requests into a file of lines: each picture once, whatever was cut off, and no other file touched."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from conftest import ROOT, in_python, launch
from forked import start_script
from parallel_parnet import Engine, ParNetError, Placement, fold, load_checkpoint
from parallel_parnet.commands.decoding import AHEAD
from parallel_parnet.commands.infer import lines as lines_module
from parallel_parnet.commands.infer import many
from parallel_parnet.commands.infer.lines import AnswerLines
from parallel_parnet.commands.infer.many import Batch, Latencies, Pictures, answer_into, spread
from parallel_parnet.commands.infer.tables import top5
from parallel_parnet.preprocess import Preprocess
from processes import descendants, free_port

DEMO = ROOT / "launch" / "demo"
ORIGINALS = sorted((DEMO / "pictures").glob("*.png"))
QUICK = ("--device", "cpu", "--executor", "eager")
QUIET = Console(quiet=True, force_terminal=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    program = fold(load_checkpoint(DEMO / "parnet_fashion.safetensors"))
    return Engine(program, Placement.single(program), "cpu", executor="eager")


def folder_of(folder: Path, count: int) -> Path:
    """A folder of links to the demo's pictures, in turn."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:05}.png").symlink_to(ORIGINALS[i % len(ORIGINALS)])
    return folder


def answer(engine: Engine, pictures: list[Path], file: Path, batch: int = 1) -> dict:
    work = Pictures.at(pictures, batch, Preprocess.of(engine.program.config))
    with AnswerLines(file, "settings") as lines:
        labels = engine.program.config.labels
        return answer_into(lines, engine, work, lambda _, logits: {"top5": top5(logits, labels)}, QUIET)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_file_that_was_cut_anywhere_is_completed_to_the_same_bytes(
    engine: Engine, batch: int, tmp_path: Path
) -> None:
    pictures = sorted(folder_of(tmp_path / "in", 23).iterdir())
    pictures[7].unlink()
    pictures[7].write_text("no picture")
    whole = tmp_path / "whole.jsonl"
    result = answer(engine, pictures, whole, batch)
    assert (result["pictures"], result["already_there"], result["skipped"]) == (23, 0, 1)
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in pictures]
    assert "not a picture" in rows[7]["reason"] and "top5" not in rows[7]
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    rng = random.Random()
    for cut in [0, 1, ends[0] - 1, ends[0], len(content) - 1, *(rng.randrange(len(content)) for _ in range(10))]:
        file = tmp_path / f"cut-{cut}.jsonl"
        file.write_bytes(content[:cut])
        result = answer(engine, pictures, file, batch)
        there = result["already_there"]
        todo = {7, *range(sum(end <= cut for end in ends), 23)}  # which had no answer, and may have one now
        assert there == 23 - len(todo)
        assert result["latency_ms"]["n"] == len({i // batch for i in todo}), "no request that has all its answers"
        assert result["pictures_per_s"] == pytest.approx((23 - there) / result["seconds"])
        assert file.read_bytes() == content, f"cut after {cut} bytes"


def test_the_answers_are_the_engines(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    answer(engine, ORIGINALS, file, batch=3)
    preprocess = Preprocess.of(engine.program.config)
    labels = json.loads((DEMO / "labels.json").read_text())
    right = 0
    for path, line in zip(ORIGINALS, file.read_text().splitlines(), strict=True):
        probabilities = engine(preprocess(path)[None])[0].softmax(0)
        top5 = json.loads(line)["top5"]
        assert [t["index"] for t in top5] == probabilities.topk(5).indices.tolist()
        assert torch.allclose(torch.tensor([t["probability"] for t in top5]), probabilities.topk(5).values, rtol=1e-4)
        right += top5[0]["label"] == labels[path.name]
    assert right >= 9


def test_lines_of_progress_where_no_terminal_has_a_bar(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(many, "EVERY_S", 0.0)
    answer(engine, ORIGINALS, tmp_path / "a.jsonl", batch=4)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"classifying: {n} of 10 pictures" for n in (4, 8, 10)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my notes\n", "line 1 is no answer"),
        (b"[" * 200_000 + b"\n", "line 1 is no answer"),
        (b'{"image": [], "settings": "settings"}\n', "line 1 is no answer"),
        (b"my notes, without an end of line", "line 1 is no answer"),
        (b'{"image": "a", "top5": []}\n', "line 1 is no answer"),
        (b'{"image": "a", "settings": "settings"}\n[1]\n', "line 2 is no answer"),
        (b'{"image": "a", "settings": "others"}\n', "another network, picture size, precision, crops, labels or data"),
        (b'{"image": "a", "settings": "settings"}\n' * 2, "line 2 has a a second time"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_left_alone(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(ParNetError, match=message):
        AnswerLines(file, "settings")
    assert file.read_bytes() == content


def test_answers_made_with_other_settings_are_not_continued(tmp_path: Path, here: Callable) -> None:
    """Each of them would be another answer."""
    file, names = tmp_path / "a.jsonl", tmp_path / "labels.txt"
    names.write_text("\n".join("abcdefghij"))
    words = ("--device", "cpu", "--executor", "eager", "--image", ORIGINALS[0], "--jsonl", file)
    assert here("infer", *words).returncode == 0
    whole = file.read_bytes()
    for other in (("--img-size", 64), ("--dtype", "bf16"), ("--labels", names), ("--activation", "relu")):
        run = here("infer", *words, *other)
        assert run.returncode == 2 and "line 1 was made with another network, picture size" in run.stderr, other
        assert file.read_bytes() == whole
    assert here("infer", *words).returncode == 0


def test_lines_are_on_the_disk_a_second_later_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with AnswerLines(tmp_path / "a", "settings") as lines:
        lines.append("a.png", {})
        assert not synced
        monkeypatch.setattr(lines_module, "SYNC_S", -1.0)
        lines.append("b.png", {})
        assert len(synced) == 1
    assert len(synced) == 2


@pytest.mark.parametrize("path", ["/dev/full", ".", "absent/a.jsonl"])
def test_no_file(path: str, tmp_path: Path) -> None:
    with pytest.raises(ParNetError, match=r"not a regular file|cannot be written"):
        AnswerLines(tmp_path / path, "settings")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with AnswerLines(tmp_path / "a", "settings"), pytest.raises(ParNetError, match="another run is writing it"):
        AnswerLines(tmp_path / "a", "settings")
    AnswerLines(tmp_path / "a", "settings").close()


def test_pictures_are_decoded_a_bounded_number_ahead(tmp_path: Path) -> None:
    decoded = []

    class Counting(Preprocess):
        def pixels(self, image):  # type: ignore[no-untyped-def]
            decoded.append(1)
            return super().pixels(image)

    pictures = Pictures.at(sorted(folder_of(tmp_path / "in", 100).iterdir()), 1, Counting(32, 1.0, (0,) * 3, (1,) * 3))
    work = pictures.batches()
    for taken in range(1, 20):
        assert isinstance(next(work), Batch)
        time.sleep(0.01)
        assert len(decoded) <= taken + AHEAD
    work.close()
    assert len(decoded) < 60, "closing gives up what was not begun"


def test_percentiles() -> None:
    found = spread([i / 1000 for i in range(101)])
    assert found == pytest.approx({"median": 50, "p90": 90, "p95": 95, "p99": 99, "mean": 50, "n": 101})


def test_latencies_are_all_kept_up_to_a_number_and_an_even_sample_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "KEPT", 1000)
    few, lots = Latencies(), Latencies()
    assert few.spread() == {}
    for i in range(1000):
        few.add(i)
    assert few.kept == array("d", range(1000)) and few.spread() == spread(range(1000))
    for i in range(100_000):
        lots.add(i / 1e8)
    assert len(lots.kept) == 1000
    sample = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "mean": 0.5, "n": 100_000}
    assert lots.spread() == pytest.approx(sample, abs=0.05)


class Quick:
    """Stands for an engine, in no time."""

    device = torch.device("cpu")

    def map(self, pictures: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        return (x.flatten(1)[:, :10].clone() for x in pictures)


def test_requests_leave_nothing_in_memory(tmp_path: Path) -> None:
    """Of what Python allocates, counted once rich's bar has the 1,000 samples that it keeps; a planted leak shows."""
    warm, step = 1100, 400
    counts, planted = [], []

    class Counting(AnswerLines):
        def append(self, image: str, answer: dict) -> None:
            super().append(image, answer)
            number = int(Path(image).stem)
            if number > warm + step:
                planted.append(object())
            if number in (warm, warm + step, warm + 2 * step):
                gc.collect()
                counts.append(sys.getallocatedblocks())

    paths = sorted(folder_of(tmp_path / "in", warm + 2 * step + 1).iterdir())
    pictures = Pictures.at(paths, 1, Preprocess(32, 1.0, (0.0,) * 3, (1.0,) * 3))
    with Counting(tmp_path / "a.jsonl", "settings") as lines:
        answer_into(lines, Quick(), pictures, lambda _, logits: {"top5": logits.tolist()}, Console(quiet=True))  # type: ignore[arg-type]
    sound, leaking = ((after - before) / step for before, after in pairwise(counts))
    assert sound < 0.5 < leaking, f"{sound:.2f} objects are kept of each request, {leaking:.2f} with the leak of one"


def test_a_full_disk_and_going_on_after_it(tmp_path: Path) -> None:
    """The limit on a file's size fails as a full disk does: part of a line is taken, the rest refused."""
    words = [*QUICK, "--image", str(folder_of(tmp_path / "in", 30)), "--jsonl", str(tmp_path / "a.jsonl")]
    code = (
        "import resource; from parallel_parnet.commands import start; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); sys.argv = {['infer.py', *words]}; start('infer')"
    )
    run = in_python(code, tmp_path, status=2)
    assert run.stderr.count("\n") == 1 and "a.jsonl: cannot be written (File too large)" in run.stderr
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert 5 < len(rows) < 30
    assert f"{len(rows)} of 30 pictures are there already" in launch("infer.py", *words).stdout
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [str(tmp_path / "in" / f"{i:05}.png") for i in range(30)]


def fill(file: Path) -> None:
    with AnswerLines(file, "settings") as lines:
        for i in range(1000):
            lines.append(f"{i}.png", {"top5": ["x" * 150]})


def test_a_disk_that_is_full_or_read_only(tmp_path: Path) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "small", tmp_path], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    try:
        file = tmp_path / "a.jsonl"
        with pytest.raises(ParNetError, match="No space left"):
            fill(file)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert [row["image"] for row in rows] == [f"{i}.png" for i in range(len(rows))] and len(rows) > 20
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        with pytest.raises(ParNetError, match="Read-only"):
            AnswerLines(file, "settings")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.ranks)])
def test_signals_end_all_ranks_and_leave_whole_lines(number: signal.Signals, ranks: int, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    torchrun = [f"--nproc-per-node={ranks}", f"--master-port={free_port()}"] if ranks else []
    words = [*QUICK, "--streams-per-gpu", "2", "--image", str(folder_of(tmp_path / "in", 5000)), "--jsonl", str(file)]
    environment, said = {**os.environ, "OMP_NUM_THREADS": "1"}, (tmp_path / "stdout", tmp_path / "stderr")
    process = start_script(ROOT / "launch" / "infer.py", words, torchrun, ROOT, environment, said)
    while process.exitcode is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.05)
    assert process.pid is not None
    started = descendants(process.pid)
    assert len(started) == ranks
    os.kill(process.pid, number)
    sent = time.monotonic()
    process.join(30)
    assert time.monotonic() - sent < (15 if ranks else 5)  # torchrun takes its time on a busy machine
    assert process.exitcode == (1 if ranks else 128 + number), said[1].read_text()
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    lines = file.read_text().splitlines(keepends=True)
    assert 0 < len(lines) < 5000 and all(line.endswith("}\n") for line in lines)
