"""The product from front to back: a checkpoint is folded, placed, run, and names ten pictures. Read this test first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel_parnet import Engine, ParNetError, Placement, Program, fold, load_checkpoint
from parallel_parnet.preprocess import Preprocess, find_images

DEMO = Path(__file__).resolve().parents[1] / "launch" / "demo"


def test_ten_pictures_from_checkpoint_to_name(tmp_path: Path) -> None:
    # a trained network, in the form in which it was trained
    model = load_checkpoint(DEMO / "parnet_fashion.safetensors")
    paths = find_images([DEMO / "pictures"])
    preprocess = Preprocess.of(model.config)
    pictures = torch.stack([preprocess(path) for path in paths])
    with torch.no_grad():
        trained = model(pictures)

    # folded: 22 convolutions and a classifier on 12 levels, whatever the training form consisted of
    program = fold(model)
    assert (len(program.operations), program.depth, program.streams) == (23, 12, 3)

    # run: on one lane and on three, in turn, the answer is the training form's
    engine = Engine(program, device="cpu")
    logits = engine(pictures)
    assert (logits - trained).norm() / trained.norm() < 1e-5
    three = Engine(program, Placement.by_streams(program, lanes=3), device="cpu", executor="eager")
    assert (three(pictures) - trained).norm() / trained.norm() < 1e-5

    # raw pixels need no normalising: the first convolution does it
    raw = torch.stack([preprocess.raw(path) for path in paths])
    assert (engine(raw) - trained).norm() / trained.norm() < 1e-4

    # the files are named after what they show, as in 7-sneaker.png
    for path, row in zip(paths, logits, strict=True):
        named = model.config.labels[row.argmax()].lower().replace("/", "-").replace(" ", "-")
        assert path.stem.partition("-")[2] == named

    # what was folded is kept as data, and gives the same bits
    program.save(tmp_path / "program.safetensors")
    again = Engine(Program.load(tmp_path / "program.safetensors"), device="cpu", executor=engine.executor)
    assert torch.equal(again(pictures), logits)

    # and what cannot be right is refused in one line
    with pytest.raises(ParNetError, match="multiples of 32"):
        engine(torch.zeros(1, 3, 33, 32))
