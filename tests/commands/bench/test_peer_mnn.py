"""MNN as a contender: what it does not run, what its converter may do, and, where it is installed, what it answers."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from contenders import subject
from parallel_parnet import Engine, ParNetError
from parallel_parnet.commands.bench import peer_mnn
from parallel_parnet.commands.bench.peer_mnn import mnn_peer
from small import relative

SUBJECT = subject()


@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"device": torch.device("cuda")}], ids=str)
def test_what_it_does_not_run(other):
    with pytest.raises(ParNetError, match="on CPUs in fp32 alone"):
        mnn_peer().build(replace(SUBJECT, **other))


def test_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "MNN", None)
    with pytest.raises(ParNetError, match="not installed here: pip install MNN"):
        mnn_peer().build(SUBJECT)


def test_a_converter_that_fails(monkeypatch):
    library = ModuleType("MNN")
    library.expr = library.nn = None
    monkeypatch.setitem(sys.modules, "MNN", library)
    monkeypatch.setattr(peer_mnn, "CONVERT", "raise SystemExit(3)")
    with pytest.raises(ParNetError, match="made no network of it: exit status 3"):
        mnn_peer().build(SUBJECT)


@pytest.mark.skipif(importlib.util.find_spec("MNN") is None, reason="pip install MNN: not installed here")
def test_it_answers_as_the_reference():
    runner, (x,) = mnn_peer().build(SUBJECT), SUBJECT.pictures(1)
    expected = Engine(SUBJECT.program, device="cpu", executor="reference")(x)
    assert relative(runner.logits(runner.call(runner.take(x))), expected) < 1e-4  # it uses Winograd's products
