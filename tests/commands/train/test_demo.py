"""The demo network: its answers in every precision, and its accuracy where the data are installed."""

from __future__ import annotations

import json

import torch

from conftest import ROOT
from parallel_parnet import Engine, fold, load_checkpoint
from parallel_parnet.preprocess import Preprocess, find_images
from small import relative

CHECKPOINT = ROOT / "launch" / "demo" / "parnet_fashion.safetensors"


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
