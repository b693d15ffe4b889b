"""The demo network: its answers in every precision, and its accuracy where the data are installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import ROOT, launch, relative
from parallel_parnet import Engine, fold, load_checkpoint
from parallel_parnet.preprocess import Preprocess, find_images

CHECKPOINT = ROOT / "launch" / "demo" / "parnet_fashion.safetensors"
DATA = Path("/usr/share/datasets/fashion-mnist")


def test_precision() -> None:
    model = load_checkpoint(CHECKPOINT)
    preprocess = Preprocess.of(model.config)
    x = torch.stack([preprocess(path) for path in find_images([ROOT / "launch" / "demo" / "pictures"])])
    with torch.no_grad():
        expected = model(x)
    program = fold(model)
    assert relative(Engine(program, device="cpu", executor="eager")(x), expected) < 1e-5
    assert relative(Engine(program, device="cpu", executor="eager", dtype=torch.bfloat16)(x), expected) < 1e-2


def test_weights_are_small() -> None:
    assert CHECKPOINT.stat().st_size <= 2_000_000


def test_the_log_tells_the_accuracy() -> None:
    log = json.loads((ROOT / "results" / "train-parnet_fashion.json").read_text())
    assert log["test_accuracy"] >= 0.92


@pytest.mark.skipif(not DATA.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_accuracy() -> None:
    run = launch("train.py", DATA, "--evaluate", "--out", CHECKPOINT)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["test_accuracy"] >= 0.92


def test_training_refuses_a_folder_without_data(tmp_path: Path) -> None:
    run = launch("train.py", tmp_path, "--out", tmp_path / "c.safetensors")
    assert run.returncode == 2
    assert "cannot be read as an IDX file" in run.stderr
    assert "Traceback" not in run.stderr
