"""int8 as its users have it: quantize writes ranges, infer and validate take them, or find their own."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import ROOT, answered, launch
from labelled import mnist
from parallel_parnet import Engine, ParNetError, Program, fold, load_checkpoint
from parallel_parnet.commands import calibration
from parallel_parnet.commands.calibration import OF_DEMO, Pictures, open_pictures, quantised
from parallel_parnet.commands.common import DEMO, DEMO_MODEL
from parallel_parnet.commands.data.finding import open_split
from parallel_parnet.commands.data.split import TEST
from parallel_parnet.commands.quantize import command
from parallel_parnet.int8.calibration import Calibration
from parallel_parnet.preprocess import Preprocess
from small import relative

CHECKPOINT = DEMO / f"{DEMO_MODEL}.safetensors"
DATA = Path("/usr/share/datasets/fashion-mnist")
EAGER = ("--device", "cpu", "--executor", "eager", "--dtype", "int8")
QUICK = (*EAGER, "--iterations", 2, "--warmup", 1)


@pytest.fixture(scope="module")
def exact() -> Program:
    return fold(load_checkpoint(CHECKPOINT))


def arguments(**given: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"calibrate": None, "checkpoint": None, "model": None, "num_classes": None, "img_size": None} | given
    )


@pytest.mark.parametrize(
    ("dtype", "arithmetic", "ranges", "words"),
    [
        ("int8", "int8", "launch/demo/parnet_fashion.int8.json; fp32 stays inits.0.0, head.fc",
         ("equal up to rounding", "operation by operation equal", "from fp32 on these pictures", "int8 by")),
        ("fp8", "float8_e4m3fn", "10 pictures of launch/demo/pictures (pictures); fp32 stays inits.0.0, head.fc",
         ("reference in fp8", "operation by operation equal", "fp8 itself: relative difference", "fp8 by 10")),
    ],
    ids=["int8", "fp8"],
)  # fmt: skip
def test_the_demo(dtype: str, arithmetic: str, ranges: str, words: tuple[str, ...], tmp_path: Path) -> None:
    """Its own ranges, or by its own pictures; the right classes, and what the type is off, beside the executor's."""
    found, said = answered(tmp_path / "a.json", *QUICK, "--dtype", dtype, "--verify")
    labels = json.loads((DEMO / "labels.json").read_text())
    assert [row["top5"][0]["label"] for row in found["predictions"]] == list(labels.values())
    assert (found["dtype"], found["arithmetic"], found["calibration"]) == (dtype, arithmetic, ranges)
    assert found["relative_difference"] <= found["limit"] and 1e-3 < found[f"error_of_{dtype}"] < 0.1
    assert found["operations"]["steps"] <= 1 and found["operations"]["values"] > 10_000
    for word in words:
        assert word in said
    assert ("no such arithmetic" in said) == (dtype == "fp8")


@pytest.mark.ranks
def test_ranks(tmp_path: Path) -> None:
    """Each finds the same ranges for itself, else they would not agree to begin; the answers of one process."""
    words = (*QUICK, "--calibrate", DEMO / "pictures")
    several, _ = answered(tmp_path / "r.json", *words, "--verify", ranks=3)
    one, _ = answered(tmp_path / "a.json", *words, "--threads", 1)
    assert several["world_size"] == 3 and several["calibration"] == one["calibration"]
    assert relative(torch.tensor(several["logits"]), torch.tensor(one["logits"])) <= several["limit"]


def test_what_each_operation_costs_in_fp8(tmp_path: Path) -> None:
    costs = tmp_path / "r.json"
    run = launch("quantize.py", DEMO / "pictures", "--dtype", "fp8", "--keep", "inits.0.1", "--results-file", costs)
    assert "Relative error of the logits in fp8" in run.stdout
    found = json.loads(costs.read_text())
    assert len(found["alone"]) == 21 and 0 < min(found["alone"].values()) <= found["error"] < 0.1
    assert (found["settings"]["dtype"], found["settings"]["keep"]) == ("fp8", ["inits.0.1"])


def test_a_network_of_ones_own(tmp_path: Path, here: Callable) -> None:
    """From random weights and made-up pictures to a calibration, what each operation costs, and answers."""
    data, ranges, costs = mnist(tmp_path / "data", 30, 8), tmp_path / "c.json", tmp_path / "r.json"
    network = ("--model", "parnet_fashion", "--num-classes", 3)
    keep = ("--keep", "inits.0.1", "--keep", "combine.3")
    run = launch("quantize.py", data, *network, *keep, "--out", ranges, "--results-file", costs)
    assert "inits.0.1 (kept in fp32)" in run.stdout and "ranges from 30 pictures of" in run.stdout
    found = json.loads(costs.read_text())
    assert len(found["alone"]) == 21 and found["error"] > 0
    assert found["settings"]["keep"] == ["inits.0.1", "combine.3"]
    again = launch("infer.py", *QUICK, *network, "--calibrate", ranges, "--verify")
    assert "fp32 stays inits.0.0, inits.0.1, combine.3, head.fc" in " ".join(again.stdout.split())
    other = here("infer", *QUICK, *network, "--seed", 1, "--calibrate", ranges)
    assert other.returncode == 2 and "c.json: a calibration of another network" in other.stderr


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """The numbers of the pictures that were asked for, each time, and their size."""
    found, batches = [], Pictures.batches

    def asked(self: Pictures, numbers: list[int], preprocess: Preprocess) -> Iterator[Tensor]:
        found.append((list(numbers), preprocess.size))
        return batches(self, numbers, preprocess)

    monkeypatch.setattr(Pictures, "batches", asked)
    return found


def test_errors_are_of_other_pictures_and_of_the_network_as_it_is_written(
    taken: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what is kept in fp32."""
    errors, whole = command.errors, []
    monkeypatch.setattr(command, "errors", lambda made, *given: whole.append(made["all"]) or errors(made, *given))
    monkeypatch.setattr(command, "errors_alone", lambda program, make, batches: {"inits.0.1": len(list(batches))})
    monkeypatch.setattr(command, "MOST", 4)
    monkeypatch.setattr(command, "COMPARED", 3)
    words = (DEMO / "pictures", "--img-size", 64, "--keep", "inits.0.1", "--out", tmp_path / "c.json")
    monkeypatch.setattr(sys, "argv", ["quantize", *map(str, words)])
    assert command.main() == 0
    (ranges, *others), sizes = ([numbers for numbers, _ in taken], {size for _, size in taken})
    assert len(ranges) == 4 and [len(set(numbers) - set(ranges)) for numbers in others] == [3, 3] and sizes == {64}
    (written,) = whole
    assert "inits.0.1.weight_step" not in written.weights and "combine.3.weight_step" in written.weights
    assert Calibration.load(tmp_path / "c.json").quantised == written.digest


def test_ranges_are_found_in_pictures_of_the_size_that_was_asked_for(
    taken: list, exact: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And far apart, where not all of them are taken."""
    monkeypatch.setattr(calibration, "MOST", 2)
    quantised(exact, arguments(calibrate=DEMO / "pictures", img_size=64))
    quantised(exact, arguments(calibrate=DEMO / "pictures"))
    assert taken == [([0, 9], 64), ([0, 9], 32)]


def test_against_fp32(tmp_path: Path) -> None:
    """Which pictures have another answer, by either way of asking."""
    folder, found = tmp_path / "val", tmp_path / "r.json"
    for name, label in json.loads((DEMO / "labels.json").read_text()).items():
        place = folder / label.replace("/", "-")
        place.mkdir(parents=True)
        shutil.copy(DEMO / "pictures" / name, place)
    words = (tmp_path, "--device", "cpu", "--executor", "eager", "--results-file", found)
    for dtype, against in (("int8", "fp32"), ("fp32", "int8")):
        launch("validate.py", *words, "--dtype", dtype, "--against", against)
        result = json.loads(found.read_text())
        assert (result["top1"]["right"], result["against"]["agreement"]["right"]) == (10, 10)
        types = [result["settings"]["dtype"], result["against"]["settings"]["dtype"]]
        assert types == ["int8", "float32"] if dtype == "int8" else types == ["float32", "int8"]
        settings = {row["dtype"]: row for row in (result["settings"], result["against"]["settings"])}
        assert "int8.json" in settings["int8"]["calibration"] and "calibration" not in settings["float32"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("absent", "absent: no such file or folder"),
        ("tests/golden", "no pictures in this folder"),
        ("launch/demo/labels.json", "labels.json: no calibration"),
        ("launch/demo/parnet_fashion.int8.json", "int8.json: a calibration of another network"),
        ("launch/demo/labels.png", "labels.png: no such file"),
    ],
)
def test_what_holds_no_ranges(path: str, says: str) -> None:
    other = fold(load_checkpoint(CHECKPOINT, activation="relu"))
    with pytest.raises(ParNetError, match=says):
        quantised(other, arguments(calibrate=ROOT / path))


def test_each_precision_has_its_own_calibration(tmp_path: Path) -> None:
    found = tmp_path / "r.json"
    words = ("--device", "cpu", "--executor", "eager", "--results-file", found)
    run = launch("validate.py", mnist(tmp_path / "data", 1, 2), *words, "--dtype", "int8", "--against", "fp8")
    result = json.loads(found.read_text())
    for settings in (result["settings"], result["against"]["settings"]):
        assert f"{settings['dtype']} by {settings['calibration']}" in run.stdout
    assert "int8.json" in result["settings"]["calibration"]


def test_a_part_for_training_that_is_damaged(tmp_path: Path) -> None:
    """Those for testing take its place, and not in silence; where they are damaged too, the first reason is told."""
    layout = mnist(tmp_path / "mnist", 30, 8)
    for prefix in ("train", "t10k"):
        path = layout / f"{prefix}-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-20])
        if prefix == "train":
            name = open_pictures(layout).name
            assert name.startswith(f"MNIST's layout, to test, since {path}: cannot be read as an IDX file")
    with pytest.raises(ParNetError, match=r"no pictures in this folder .*; .*train-images-idx3-ubyte\.gz: cannot be"):
        open_pictures(layout)


def test_any_pictures_will_do(tmp_path: Path) -> None:
    """Those for training, else those that are there; spread, so that classes that lie together are all met."""
    layout = open_pictures(mnist(tmp_path / "mnist", 30, 8))
    assert (layout.name, layout.count) == ("MNIST's layout, to train", 30)
    assert layout.spread(4) == [0, 10, 19, 29] and len(layout.spread(99)) == 30
    assert not set(layout.spread(20)) & set(layout.spread(20, frozenset(layout.spread(20))))
    plain = open_pictures(DEMO / "pictures")
    assert (plain.name, plain.count) == ("pictures", 10)
    assert open_pictures(DEMO / "pictures" / "8-bag.png").count == 1
    shutil.copytree(DEMO / "pictures", tmp_path / "classes" / "bag")
    name = open_pictures(tmp_path / "classes").name
    assert name.startswith(f"folders of classes, to test, since {tmp_path / 'classes'}: put the folders")
    preprocess = Preprocess(32, 1.0, (0.5,) * 3, (0.5,) * 3)
    batches = list(plain.batches([3, 8], preprocess))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 32, 32)]
    assert torch.equal(batches[0][1], preprocess(DEMO / "pictures" / "8-bag.png"))


def test_the_demo_s_ranges_are_of_its_weights(exact: Program) -> None:
    found = Calibration.load(OF_DEMO)
    program, words = quantised(exact, arguments())
    assert program.digest == found.quantised == found.applied(exact).digest
    assert words == "launch/demo/parnet_fashion.int8.json; fp32 stays inits.0.0, head.fc"
    log = json.loads((ROOT / "results" / "quantize-parnet_fashion.json").read_text())
    assert log["settings"]["program"] == found.program and log["settings"]["keep"] == list(found.keep) == []


@pytest.mark.skipif(not DATA.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_demo_keeps_its_accuracy(exact: Program) -> None:
    """On the first 1,000 test pictures, at most a few of which get another answer than in fp32."""
    split, preprocess = open_split(DATA, TEST), Preprocess.of(exact.config)
    x = torch.stack([torch.from_numpy(preprocess.pixels(split.open(i)).copy()) for i in range(1000)])
    x = preprocess.normalise(x)
    fp32, int8, fp8 = (
        Engine(program, device="cpu", executor="eager")(x).argmax(1)
        for program in (exact, *(quantised(exact, arguments(), to)[0] for to in ("int8", "fp8")))
    )
    truth = torch.from_numpy(split.truth[:1000])
    assert (int8 == fp32).sum() >= 990 and abs(int((int8 == truth).sum() - (fp32 == truth).sum())) <= 5
    assert (fp8 == fp32).sum() >= 985 and abs(int((fp8 == truth).sum() - (fp32 == truth).sum())) <= 8
