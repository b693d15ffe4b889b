"""Engines in files: what is kept, and files that hold none."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from parallel_parnet import Engine, ParNetError, Placement, Program, fold
from parallel_parnet.saved import Saved
from small import SMALL, lively

PROGRAM = fold(lively(SMALL, 9))


def test_save_and_load(tmp_path: Path) -> None:
    path, x = tmp_path / "e.safetensors", torch.randn(1, 3, 64, 32)
    placement = Placement.by_streams(PROGRAM, 2)
    engine = Engine(PROGRAM, placement, "cpu", torch.bfloat16, "eager")
    engine.save(path)
    loaded = Engine.load(path)
    assert (loaded.placement, loaded.dtype, loaded.executor) == (placement, torch.bfloat16, "eager")
    assert torch.equal(loaded(x), engine(x))
    assert Program.load(path).digest == PROGRAM.digest, "it is a program's file as well"


def test_a_placement_of_any_mapping_is_saved(tmp_path: Path) -> None:
    placement = Placement(1, MappingProxyType(dict.fromkeys(PROGRAM.by_name, (0,))))
    Engine(PROGRAM, placement, "cpu", executor="eager").save(tmp_path / "e.safetensors")
    assert Engine.load(tmp_path / "e.safetensors").placement == Placement(1, dict(placement.where))


def test_an_earlier_versions_name_for_auto_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {"dtype": "torch.float32", "executor": "cpu", "chosen": "eager"}
    path = tmp_path / "e.safetensors"
    PROGRAM.save(path, {"engine": json.dumps(saved | dict.fromkeys(("placement", "threads", "cores")))})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = Engine.load(path)
    assert engine.device == torch.device("cpu") and engine.executor == Engine(PROGRAM, device="cpu").executor
    engine.save(path)
    assert json.loads(Program.read(path)[1]["engine"])["executor"] == "auto"


@pytest.mark.parametrize(("threads", "holds"), [(1, False), (2, True), (3, False)])
def test_what_two_threads_were_measured_with_holds_for_two(
    threads: int, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel_parnet.saved.usual_threads", lambda: threads)
    measured = Saved(torch.float32, "auto", "eager", None, 2, cores=2)
    assert measured.holds_on(torch.device("cpu"), PROGRAM) == holds


def everywhere(on: object) -> dict:
    """A placement of one lane as a file holds it."""
    return {"lanes": 1, "where": dict.fromkeys(PROGRAM.by_name, on), "coordinator": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "torch.int8"}, "holds no engine"),
        ({"executor": "tensorrt"}, "unknown executor"),
        ({"executor": "cuda_graph"}, "NVIDIA GPUs: choose eager"),
        ({"placement": {"lanes": 1, "where": {}, "coordinator": 0}}, "leaves out operation"),
        ({"placement": {"lanes": 10**9, "where": {}, "coordinator": 0}}, "1000000000 lanes: 1024 at most"),
        ({"placement": {"lanes": 1}}, "holds no engine"),
        ({"placement": [1]}, "holds no engine"),
        ({"threads": -1}, "-1 threads"),
        ({"placement": 0}, "holds no engine"),
        ({"placement": everywhere("0")}, "lane '0'"),
        ({"placement": everywhere([0.0])}, "lane 0.0"),
        ({"placement": everywhere([0]) | {"lanes": True}}, "lane True"),
        ({"threads": "many"}, "'many' threads"),
        ({"threads": 10**9}, "1000000000 threads: .* at most 1024"),
        ({"threads": True}, "True threads"),
        ({"cores": 2.0}, "2.0 cores"),
        ({"given": 1}, "given or not, and 1 is neither"),
        ({"chosen": ["native"]}, "unknown executor"),
        ({"chosen": "auto"}, "unknown executor"),
        ({"dtype": []}, "holds no engine"),
        ({"more": 1}, "holds no engine"),
    ],
    ids=str,
)
def test_files_that_hold_no_engine(change: dict, message: str, tmp_path: Path) -> None:
    saved = {"dtype": "torch.float32", "executor": "eager", "chosen": "eager"}
    saved |= dict.fromkeys(("placement", "threads", "cores"))
    path = tmp_path / "e.safetensors"
    PROGRAM.save(path, {"engine": json.dumps(saved)})
    assert Engine.load(path, "cpu").executor == "eager"
    PROGRAM.save(path, {"engine": json.dumps(saved | change)})
    with pytest.raises(ParNetError, match=rf"e\.safetensors: .*{message}"):
        Engine.load(path, "cpu")


def test_other_files_hold_no_engine(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    PROGRAM.save(path)
    with pytest.raises(ParNetError, match=r"holds no engine, but a program alone: Engine\(Program\.load\("):
        Engine.load(path)
    with pytest.raises(ParNetError, match="no such program file"):
        Engine.load(tmp_path / "absent.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ParNetError, match=r"p\.safetensors"):
        Engine.load(path)
