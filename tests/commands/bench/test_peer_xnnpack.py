"""LiteRT and ExecuTorch as contenders: what they do not run, what they are given, and, where installed, what they
answer."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from contenders import subject
from parallel_parnet import Engine, ParNetError, fold, load_checkpoint
from parallel_parnet.commands.bench.measure import COMPARED_IN_INT8
from parallel_parnet.commands.bench.peer_xnnpack import xnnpack_int8_peer, xnnpack_peers
from parallel_parnet.commands.bench.proof import LIMITS, expected_logits
from parallel_parnet.commands.bench.running import set_up
from parallel_parnet.commands.bench.subject import Contender
from parallel_parnet.commands.common import DEMO, DEMO_MODEL
from small import relative

SUBJECT = subject()
LITERT, EXECUTORCH = xnnpack_peers()
PACKAGES = {LITERT: ("ai_edge_litert", "litert_torch"), EXECUTORCH: ("executorch",)}


def expected(picture: Tensor) -> Tensor:
    return Engine(SUBJECT.program, device="cpu", executor="reference")(picture)


@pytest.mark.parametrize("peer", [LITERT, EXECUTORCH], ids=lambda peer: peer.name)
def test_they_do_not_run_on_gpus(peer: Contender) -> None:
    with pytest.raises(ParNetError, match="runs on the CPU here"):
        peer.build(replace(SUBJECT, device=torch.device("cuda")))


@pytest.mark.parametrize(
    ("peer", "module", "package"),
    [(LITERT, "ai_edge_litert", "ai-edge-litert"), (EXECUTORCH, "executorch", "executorch"),
     (xnnpack_int8_peer(), "executorch", "executorch")],
)  # fmt: skip
def test_without_them(peer: Contender, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ParNetError, match=f"not installed here: pip install {package}"):
        peer.build(SUBJECT)


def test_litert_is_given_the_folded_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for its converter, which keeps the network it was given, and its interpreter, which runs it."""
    given: list[tuple[Callable, tuple]] = []

    def convert(module: Callable, example: tuple) -> SimpleNamespace:
        given.append((module, example))
        return SimpleNamespace(export=lambda file: Path(file).write_bytes(b"made"))

    class Interpreter:
        def __init__(self, model_content: bytes, num_threads: int) -> None:
            assert (model_content, num_threads) == (b"made", SUBJECT.threads)
            self.tensors: dict[int, np.ndarray] = {}

        def allocate_tensors(self) -> None:
            self.get_input_details, self.get_output_details = (lambda: [{"index": 3}]), (lambda: [{"index": 5}])

        def set_tensor(self, index: int, picture: np.ndarray) -> None:
            self.tensors[index] = picture

        def invoke(self) -> None:
            self.tensors[5] = given[0][0](torch.from_numpy(self.tensors[3])).numpy()

        def get_tensor(self, index: int) -> np.ndarray:
            return self.tensors[index]

    monkeypatch.setitem(sys.modules, "litert_torch", SimpleNamespace(convert=convert))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "ai_edge_litert", SimpleNamespace())  # type: ignore[arg-type]
    library = SimpleNamespace(Interpreter=Interpreter)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", library)  # type: ignore[arg-type]
    runner, (x,) = LITERT.build(SUBJECT), SUBJECT.pictures(1)
    assert relative(runner.logits(runner.call(runner.take(x))), expected(x)) < 1e-5
    (_, (example,)) = given[0]
    assert example.shape == x.shape, "and for pictures of this shape alone"


@pytest.mark.parametrize("peer", [LITERT, EXECUTORCH], ids=lambda peer: peer.name)
def test_they_answer_as_the_reference(peer: Contender) -> None:
    if missing := [package for package in PACKAGES[peer] if importlib.util.find_spec(package) is None]:
        pytest.skip(f"not installed here: {', '.join(missing)}")
    runner = peer.build(SUBJECT)
    for x in SUBJECT.pictures(2):
        assert relative(runner.logits(runner.call(runner.take(x))), expected(x)) < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="pip install executorch: not installed here")
def test_int8_agrees() -> None:
    model = load_checkpoint(DEMO / f"{DEMO_MODEL}.safetensors").requires_grad_(False)
    demo = replace(SUBJECT, network=model, program=fold(model), size=model.config.image_size, dtype=torch.int8)
    pictures = demo.pictures(COMPARED_IN_INT8)
    found = set_up(xnnpack_int8_peer(), demo, pictures, expected_logits(demo, pictures))
    assert found.runner is not None, found.missing
    assert 1e-3 < found.error < LIMITS[torch.int8], "int8 rounds more than floats do"
