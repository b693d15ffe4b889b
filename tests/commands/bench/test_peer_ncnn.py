"""ncnn as a contender: what it does not run, and, where it is installed, that it answers as the reference does."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from contenders import subject
from parallel_parnet import Engine, ParNetError
from parallel_parnet.commands.bench.peer_ncnn import ncnn_peer
from small import relative

SUBJECT = subject()


@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"device": torch.device("cuda")}], ids=str)
def test_what_it_does_not_run(other):
    with pytest.raises(ParNetError, match="fp32 on CPUs alone"):
        ncnn_peer().build(replace(SUBJECT, **other))


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("ncnn", "pnnx"))), reason="pip install ncnn pnnx: not installed here"
)
@pytest.mark.parametrize("batch", [1, 3])
def test_it_answers_as_the_reference(batch):
    several = replace(SUBJECT, batch=batch)
    runner, (x,) = ncnn_peer().build(several), several.pictures(1)
    expected = Engine(SUBJECT.program, device="cpu", executor="reference")(x)
    assert relative(runner.logits(runner.call(runner.take(x))), expected) < 1e-5
