"""Accuracy: right to the picture, whatever executor, ranks and interruptions; and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest

from conftest import ROOT, launch
from labelled import colours, idx, mnist
from parallel_parnet import Engine, ParNetError, fold, load_checkpoint
from parallel_parnet.commands.data.finding import open_split
from parallel_parnet.commands.data.split import TEST
from parallel_parnet.commands.train.made_up import draw
from parallel_parnet.commands.validate import command
from parallel_parnet.commands.validate.report import check_result_files, show, write
from parallel_parnet.commands.validate.scores import compare, lines, score, wilson
from parallel_parnet.network.variants import VARIANTS
from parallel_parnet.preprocess import Preprocess

DEMO = ROOT / "launch" / "demo"
CHECKPOINT = DEMO / "parnet_fashion.safetensors"
NAMES = [label.replace("/", "-") for label in VARIANTS["parnet_fashion"].labels]
DATA = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's ten pictures in folders of their classes, and one file that is no picture."""
    folder = tmp_path_factory.mktemp("folders")
    for name, label in json.loads((DEMO / "labels.json").read_text()).items():
        place = folder / "val" / label.replace("/", "-")
        place.mkdir(parents=True)
        shutil.copy(DEMO / "pictures" / name, place)
    return folder


@pytest.mark.parametrize(("right", "of"), [(0, 1), (1, 1), (9348, 10_000), (3, 7)])
def test_intervals_are_scipys(right: int, of: int) -> None:
    expected = binomtest(right, of).proportion_ci(method="wilson")
    assert wilson(right, of) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_ten_crops_are_middle_corners_and_their_mirror_images() -> None:
    preprocess = Preprocess.of(load_checkpoint(CHECKPOINT).config)
    wide = Preprocess(32, 0.5, preprocess.mean, preprocess.std)
    image = Image.effect_noise((128, 64), 100).convert("RGB")  # is cut without being resized
    pixels, ten = torch.from_numpy(wide.ten_crop(image).copy()), wide.ten_crop(image)
    whole = torch.from_numpy(np.array(image))
    places = ((16, 48), (0, 0), (0, 96), (32, 0), (32, 96))
    for i, (top, left) in enumerate(places):
        assert torch.equal(pixels[i], whole[top : top + 32, left : left + 32])
        assert torch.equal(pixels[i + 5], pixels[i].flip(1))
    assert (wide.pixels(image) == ten[0]).all()
    assert wide.ten_crop(Image.new("RGB", (60_000, 1))).shape == (10, 32, 32, 3)


def test_folders_are_answered_by_name(folder: Path, tmp_path: Path) -> None:
    bad = folder / "val" / "Bag" / "broken.png"
    bad.write_text("no picture")
    found, table, kept = (tmp_path / name for name in ("r.json", "r.csv", "a.jsonl"))
    options = ("--device", "cpu", "--executor", "eager", "--dtype", "bf16", "--against", "reference", "--ten-crop")
    words = (folder, *options, "-b", 4, "--results-file", found, "--results-file", table, "--resume", kept)
    run = launch("validate.py", *words, status=1)
    bad.unlink()
    assert "broken.png: not a picture" in run.stdout and "1 skipped" in run.stdout
    result = json.loads(found.read_text())
    assert (result["top1"]["of"], result["skipped"]) == (10, 1) and result["top1"]["right"] >= 9
    assert result["settings"]["dtype"] == "bfloat16" and result["against"]["settings"]["executor"] == "reference"
    (row,) = csv.DictReader(table.open())
    assert list(row)[:5] == ["model", "top1", "top1_err", "top5", "top5_err"] and row["ten_crop"] == "True"
    assert float(row["top1"]) == 100 * result["top1"]["share"]
    changed = compare(kept, kept.with_name("a.reference.jsonl"))
    assert changed == {key: result["against"][key] for key in changed}


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(tmp_path: Path, here: Callable) -> None:
    data, kept = mnist(tmp_path / "data", 1, 23), tmp_path / "answers.jsonl"
    words = (data, "--device", "cpu", "--executor", "eager", "-b", 4, "--resume", kept)
    launch("validate.py", *words)
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    run = launch("validate.py", *words)
    assert "of 23 pictures are there already, continuing" in run.stdout
    assert kept.read_bytes() == whole
    assert " 0.0 pictures/s" in here("validate", *words).stdout, "of those that were answered now"
    for others in (("--img-size", 64), ("--ten-crop",), ("--dtype", "bf16"), ("--executor", "reference")):
        other = here("validate", *words, *others)
        assert other.returncode == 2 and "made with another network, picture size" in other.stderr, others
    assert kept.read_bytes() == whole


def test_answers_are_by_what_made_them(tmp_path: Path, here: Callable) -> None:
    """Whichever executor goes on, or has nothing left to do."""
    data, kept, found = mnist(tmp_path / "data", 1, 8), tmp_path / "answers.jsonl", tmp_path / "r.json"
    words = ("validate", data, "--device", "cpu", "-b", 4, "--resume", kept, "--results-file", found)

    def executor(*more: object) -> str:
        run = here(*words, *more)
        assert run.returncode == 0 and f"executor {json.loads(found.read_text())['settings']['executor']}" in run.stdout
        return json.loads(found.read_text())["settings"]["executor"]

    other = executor()
    assert executor("--executor", "inductor", "--against", "reference") == other != "inductor"
    assert json.loads(found.read_text())["against"]["settings"]["executor"] == "reference"
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[:4]))
    assert executor("--executor", "eager") == (f"{other}, eager" if other != "eager" else other)


def test_a_picture_that_was_mended_is_tried_again(tmp_path: Path, here: Callable) -> None:
    """And one that was not keeps its line, one alone."""
    data, kept, found = colours(tmp_path / "data", {"val": 2}, NAMES), tmp_path / "a.jsonl", tmp_path / "r.json"
    mended, lost = (data / "val" / name / "000.png" for name in ("Bag", "Coat"))
    good = mended.read_bytes()
    for path in (mended, lost):
        path.write_text("no picture")
    words = ("validate", data, "--device", "cpu", "--executor", "eager", "--against", "reference", "-b", 3)
    words += ("--resume", kept, "--results-file", found)

    def counted(status: int) -> list[int]:
        assert here(*words).returncode == status
        result = json.loads(found.read_text())
        return [part["of"] for part in (result["top1"], result["against"]["top1"], result["against"]["agreement"])]

    assert counted(1) == [18] * 3
    whole = kept.read_bytes()
    assert counted(1) == [18] * 3 and kept.read_bytes() == whole
    mended.write_bytes(good)
    assert counted(1) == [19] * 3 and kept.read_bytes().startswith(whole)
    assert [row["image"] for row in lines(kept)][1] == "Ankle boot/001.png", "in the order of the pictures"
    whole = kept.read_bytes()
    lost.write_bytes(good)
    assert counted(0) == [20] * 3 == counted(0) and len(kept.read_bytes().splitlines()) == 22


def test_the_part_that_was_asked_for_is_answered(tmp_path: Path, here: Callable) -> None:
    data, found = mnist(tmp_path / "data", 5, 3), tmp_path / "r.json"
    for part, count in (("train", 5), ("test", 3)):
        run = here("validate", data, "--device", "cpu", "--executor", "eager", "--split", part, "--results-file", found)
        result = json.loads(found.read_text())
        assert run.returncode == 0 and (result["top1"]["of"], result["settings"]["split"]) == (count, part)
        assert f"{count} pictures of {data}, split {part}" in run.stdout


def test_a_picture_that_only_the_second_precision_skips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Callable
) -> None:
    """As where logits leave the range of fp16: the status tells."""
    monkeypatch.setattr(command, "score", lambda file: score(file) | {"skipped": int(".reference" in file.name)})
    run = here("validate", mnist(tmp_path / "data", 1, 2), "--device", "cpu", "--against", "reference")
    assert run.returncode == 1, run.stderr


def test_scores_and_their_row_by_hand(tmp_path: Path) -> None:
    for name, rows in (("a", [[0, 1, 2], [1, 0, 2], [5, 6, 7], []]), ("b", [[0, 1, 2], [0, 1, 2], [6, 5, 7], [0]])):
        made = [{"image": f"{i}", "label": 0, "top5": row} if row else {"image": f"{i}", "reason": "?"}
                for i, row in enumerate(rows)]  # fmt: skip
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in made))
    found = score(tmp_path / "a") | compare(tmp_path / "a", tmp_path / "b")
    assert [found[key]["right"] for key in ("top1", "top5", "agreement")] == [1, 2, 1]
    assert {found[key]["of"] for key in ("top1", "top5", "agreement")} == {3}
    assert found["skipped"] == 1 and found["changed"] == [
        {"image": "1", "label": 0, "answer": 1, "against": 0}, {"image": "2", "label": 0, "answer": 5, "against": 6},
    ]  # fmt: skip
    settings = {"checkpoint": "a/b.pth.tar", "parameters": 1_234_567, "img_size": 32, "crop_pct": 0.9, "dtype": "x"}
    against = {"name": "int8", "agreement": found["agreement"]}
    write({**found, "settings": settings, "against": against}, [tmp_path / "r.csv"])
    (row,) = csv.DictReader((tmp_path / "r.csv").open())
    assert (row["model"], row["dtype"], row["param_count"]) == ("b.pth.tar", "x", "1.23")
    shares = [float(row[key]) for key in ("top1", "top1_err", "top5", "top5_err", "agreement")]
    assert shares == [33.3333, 66.6667, 66.6667, 33.3333, 33.3333]
    assert (float(row["top1_low"]), float(row["top1_high"])) == pytest.approx([100 * s for s in wilson(1, 3)], abs=1e-4)
    assert (row["pictures"], row["skipped"], row["against"]) == ("3", "1", "int8")


def test_one_process_chooses_its_placement(folder: Path) -> None:
    run = launch("validate.py", folder, "--device", "cpu", "--placement", "auto")
    assert "measured: " in run.stdout


@pytest.mark.ranks
def test_ranks_answer_as_the_reference(folder: Path, tmp_path: Path) -> None:
    found = tmp_path / "r.json"
    words = (folder, "--device", "cpu", "--executor", "eager", "--against", "reference", "--results-file", found)
    launch("validate.py", *words, ranks=3)
    result = json.loads(found.read_text())
    assert (result["top1"]["right"], result["against"]["agreement"]["right"]) == (10, 10)
    assert result["settings"]["ranks"] == 3 and not result["against"]["changed"]


def test_answers_to_other_pictures_are_refused(tmp_path: Path, here: Callable) -> None:
    """Of another part, folder or truth, though names and layout are the same; and two files that cannot be compared."""
    data, kept = mnist(tmp_path / "data", 3, 3), tmp_path / "a.jsonl"
    options = ("--device", "cpu", "--executor", "eager", "--resume", kept)
    launch("validate.py", data, *options)
    whole = kept.read_bytes()
    moved = shutil.copytree(data, tmp_path / "moved")
    for words in ((data, "--split", "train"), (moved,)):
        run = here("validate", *words, *options)
        assert run.returncode == 2 and "crops, labels or data; give those" in run.stderr, run.stderr
    (data / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.asarray([2, 1, 0], np.uint8))))
    run = here("validate", data, *options)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and kept.read_bytes() == whole
    other = tmp_path / "b.jsonl"
    for rows in (whole.splitlines(keepends=True)[::-1], whole.splitlines(keepends=True)[:2]):
        other.write_bytes(b"".join(rows))
        with pytest.raises(ParNetError, match=r"a\.jsonl and .*b\.jsonl: line \d is not of the same picture"):
            compare(kept, other)


def headless(path: Path) -> Path:
    save_file({k: v for k, v in load_file(CHECKPOINT).items() if not k.startswith("head.")}, path)
    return path


def test_what_is_refused_in_one_line(folder: Path, tmp_path: Path, here: Callable) -> None:
    with pytest.raises(ParNetError, match=r"ends in \.json or \.csv"):
        check_result_files([Path("r.txt")])
    with pytest.raises(ParNetError, match="no such folder"):
        check_result_files([tmp_path / "none" / "r.csv"])
    draw(tmp_path / "shapes", {"val": 1})
    kept = tmp_path / "a.json"
    for words, says in (
        ((folder, "--device", "cpu", "--resume", kept, "--against", "fp16"), "float16 on the CPU"),
        ((folder, "--resume", kept, "--results-file", kept), "a.json: named twice"),
        ((folder, "--resume", kept, "--results-file", f"{tmp_path}/../{tmp_path.name}/a.json"), "named twice"),
        ((folder, "--resume", kept, "--against", "fp32", "--results-file", tmp_path / "a.fp32.json"), "named twice"),
        ((tmp_path / "shapes",), "'disc' in folders of classes is none of the network's 10 classes"),
        ((folder, "--checkpoint", headless(tmp_path / "h.safetensors")), "lacks head.fc.weight"),
        ((folder, "--labels", "/dev/null"), "/dev/null: 0 lines for 10 classes; give one name per line"),
    ):
        run = here("validate", *words)
        assert run.returncode == 2 and says in run.stderr and run.stderr.count("\n") == 1, run.stderr
        assert not kept.exists(), "nothing is answered before"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_demo_s_accuracy_to_the_picture() -> None:
    log = json.loads((ROOT / "results" / "train-parnet_fashion.json").read_text())
    model = load_checkpoint(CHECKPOINT)
    split, preprocess = open_split(DATA, TEST), Preprocess.of(model.config)
    engine = Engine(fold(model), device="cpu")
    right = 0
    for start in range(0, len(split), 500):
        x = torch.stack([torch.from_numpy(preprocess.pixels(split.open(i)).copy()) for i in range(start, start + 500)])
        right += (engine(preprocess.normalise(x)).argmax(1).numpy() == split.truth[start : start + 500]).sum()
    assert right == 10_000 * log["test_accuracy"] == 9348


@pytest.mark.parametrize("classes", [5, 6])
def test_five_of_five_classes_say_nothing(classes: int, capsys: pytest.CaptureFixture) -> None:
    one = {"right": 1, "of": 2, "share": 0.5, "low": 0.1, "high": 0.9}
    show({"top1": one, "top5": one}, ["a"] * classes, Console())
    assert ("top-5" in capsys.readouterr().out) == (classes > 5)
