"""How many threads a command takes, and options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from labelled import mnist
from parallel_parnet import Engine, ParNetError, fold, load_checkpoint
from parallel_parnet.commands.common import Parser, add_model_arguments, load_model
from parallel_parnet.commands.engine_arguments import lane_hosts
from parallel_parnet.commands.infer import command as infer
from parallel_parnet.commands.ranks import Ranks
from parallel_parnet.commands.validate import command as validate
from parallel_parnet.cores import cores
from small import GOLDEN, OPTIONAL, SMALL, lively


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(0, 1, 0, 1)
    monkeypatch.setattr("parallel_parnet.commands.ranks.cores", lambda: 6)
    for asked, wanted, threads in ((None, None, 6), ("3", None, 3), ("3", 2, 2), ("many", None, 6), ("0", None, 6),
                                   ("99999", None, 6), ("9" * 5000, None, 6)):  # fmt: skip
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if asked is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert ranks.take_threads(wanted) == torch.get_num_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Ranks(1, 3, 1, 3).take_threads() == 2, "torchrun sets it to 1 where nobody did"
    assert Ranks(5, 6, 2, 3).take_threads() == 2, "of the cores of this machine, by its ranks alone"
    for wanted in (0, 99999):
        with pytest.raises(ParNetError, match=f"--threads {wanted}"):
            ranks.take_threads(wanted)


@pytest.mark.parametrize("executor", ["eager", *OPTIONAL])
def test_threads_that_are_told_are_those_that_compute(executor: str) -> None:
    """Of more than there are cores, torch takes all and others do not."""
    ranks, program, before = Ranks(0, 1, 0, 1), fold(lively(SMALL, 0)), torch.get_num_threads()
    try:
        ranks.take_threads(cores() + 1)
        told = lane_hosts(Engine(program, device="cpu", executor=executor), ranks)
    finally:
        torch.set_num_threads(before)
    assert told == [("cpu", cores() + (executor == "eager"))]


def loaded(*words: str) -> tuple[dict[str, torch.Tensor], str]:
    """The weights and the activation of the network that these arguments ask for."""
    parser = Parser()
    add_model_arguments(parser)
    model, _ = load_model(parser.parse_args(words))
    return model.state_dict(), model.config.activation


def test_a_network_is_the_one_that_was_asked_for() -> None:
    """By each option that several commands have."""
    path = GOLDEN / "official_narrow_silu.pth.tar"
    for ema in (False, True):
        weights, activation = loaded("--checkpoint", str(path), "--activation", "relu", *["--ema"] * ema)
        expected = load_checkpoint(path, ema=ema).state_dict()
        other = load_checkpoint(path, ema=not ema).state_dict()
        assert activation == "relu" and all(torch.equal(weights[key], expected[key]) for key in expected)
        assert not all(torch.equal(weights[key], other[key]) for key in other)
    variant = ("--model", "parnet_cifar_1m", "--num-classes", "3", "--activation", "relu", "--seed")
    (first, activation), (again, _), (another, _) = (loaded(*variant, seed) for seed in "112")
    assert activation == "relu" and len(first["head.fc.bias"]) == 3
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.fc.weight"], another["head.fc.weight"])


@pytest.mark.parametrize("command", [infer, validate], ids=["infer", "validate"])
def test_the_engine_is_the_one_that_was_asked_for(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Callable
) -> None:
    asked: list[tuple] = []

    def planted(program: object, placement: object, device: object, *others: object) -> None:
        asked.append(others)
        raise ParNetError("as planted")

    monkeypatch.setattr(command, "Engine", planted)
    name, *data = ("infer",) if command is infer else ("validate", mnist(tmp_path / "data", 1, 1))
    words = ("--device", "cpu", "--executor", "eager", "--dtype", "bf16", "--transport", "gloo")
    run = here(name, *data, *words)
    assert run.returncode == 2 and "as planted" in run.stderr
    assert asked == [(torch.bfloat16, "eager", "gloo")]
