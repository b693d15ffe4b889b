"""Which pictures are taken, and in what batches they are timed."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from conftest import ROOT, answered, launch
from parallel_parnet import create_model, fold
from parallel_parnet.commands.infer.few import equal_batches, measure
from parallel_parnet.commands.infer.many import Pictures
from parallel_parnet.preprocess import Preprocess, find_images

DEMO = ROOT / "launch" / "demo"
QUICK = ("--device", "cpu", "--iterations", 3, "--warmup", 1)


@pytest.mark.parametrize(("asked", "timed"), [(1, [1] * 10), (4, [4, 4]), (5, [5, 5]), (16, [10])])
def test_batches_of_one_size_are_timed(asked: int, timed: list[int]) -> None:
    """Without what is left over of ten pictures; of fewer than a batch, all."""
    paths = list(find_images([DEMO / "pictures"]))
    program = fold(create_model("parnet_fashion"))
    assert [len(x) for x in equal_batches(Pictures.at(paths, asked, Preprocess.of(program.config)))] == timed


def test_the_batch_that_was_timed_is_told(tmp_path: Path) -> None:
    result, said = answered(tmp_path / "a.json", *QUICK, "--executor", "eager", "-b", 16)
    assert result["batch_size"] == len(result["predictions"]) == 10
    (stages,) = result["stages_ms"]
    assert 0.02 < sum(stages.values()) / result["latency_ms"]["median"] < 50, "of one pass, both of them in ms"
    assert "10 pictures fill no batch of 16" in said and "batch 10, depth" in said


def test_passes_before_the_timed_ones_are_made_and_not_counted() -> None:
    passes: list[int] = []

    class Counting(SimpleNamespace):
        def __call__(self, x: int) -> None:
            passes.append(x)

    args = argparse.Namespace(warmup=2, iterations=5)
    engine = Counting(device=torch.device("cpu"))
    assert measure(engine, [1, 2, 3], args, Console(quiet=True))["n"] == 5  # type: ignore[arg-type]
    assert passes == [1, 2, 1, 2, 3, 1, 2]


def test_what_a_folder_holds_beside_pictures(tmp_path: Path) -> None:
    shutil.copy(DEMO / "pictures" / "7-sneaker.png", tmp_path)
    (tmp_path / "._7-sneaker.png").write_bytes(b"AppleDouble")
    (tmp_path / "raw.nef").touch()
    (tmp_path / "deeper [b]").mkdir()
    file = tmp_path / "deeper [b]" / "answers.jsonl"
    run = launch("infer.py", "--device", "cpu", "--image", tmp_path, "--jsonl", file)
    said = " ".join(run.stdout.split())
    assert "1 file(s) passed over (.nef), 1 folder(s) in it not searched" in said and "/deeper [b]/answers" in said
    assert len(file.read_text().splitlines()) == 1
