"""launch/infer.py as its users run it: one process, and real ranks."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import ROOT, answered, launch
from parallel_parnet import Engine, create_model, fold, load_checkpoint, save_checkpoint
from parallel_parnet.commands.calibration import OF_DEMO, quantised
from parallel_parnet.commands.common import fit_norms
from parallel_parnet.commands.infer import few
from parallel_parnet.commands.infer.few import Answers, Verified, verify
from parallel_parnet.commands.infer.many import Pictures
from parallel_parnet.files import write_json
from parallel_parnet.kernels.cpu import objects
from parallel_parnet.parity import tolerance, tolerance_quantised
from parallel_parnet.preprocess import Preprocess, find_images
from processes import free_port
from small import GOLDEN, OPTIONAL, relative

DEMO = ROOT / "launch" / "demo"
KEYS = {
    "predictions", "logits", "latency_ms", "placement", "executor", "device", "dtype", "world_size", "depth",
    "max_abs_difference",
}  # fmt: skip
QUICK = ("--device", "cpu", "--iterations", 3, "--warmup", 1)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What one process with the plain reference answers."""
    return answered(tmp_path_factory.mktemp("single") / "a.json", *QUICK, "--executor", "reference")[0]


@pytest.mark.ranks
def test_torchrun_with_defaults(single: dict, tmp_path: Path) -> None:
    result, said = answered(tmp_path / "a.json", "--streams-per-gpu", 1, "--verify", ranks=1, anew=True)
    assert result.keys() >= KEYS
    assert relative(torch.tensor(result["logits"]), torch.tensor(single["logits"])) < 1e-5
    assert result["latency_ms"].keys() == {"median", "p90", "p95", "p99", "mean", "n"}
    assert result["latency_ms"]["n"] == 50
    assert result["depth"] == 12
    labels = json.loads((DEMO / "labels.json").read_text())
    assert {Path(row["image"]).name: row["top5"][0]["label"] for row in result["predictions"]} == labels
    for row, logits in zip(result["predictions"], result["logits"], strict=True):
        probabilities = torch.tensor(logits).softmax(0)
        assert [t["index"] for t in row["top5"]] == probabilities.topk(5).indices.tolist()
        assert row["top5"][0]["probability"] == pytest.approx(probabilities.max().item(), abs=1e-6)
    if not torch.cuda.is_available():
        assert said.startswith("Top 5"), "no puzzle about GPUs comes first"
    for word in ("Ankle boot", "median", "stream 2", "Placement", "equal up to rounding"):
        assert word in said


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "k", "options"),
    [
        (3, 1, ("--executor", "eager")),
        (2, 2, ("--executor", ["eager", *OPTIONAL][-1], "--batch-size", 4)),
        (3, 2, ("--executor", "auto")),
        (3, 1, ("--executor", "auto", "--dtype", "bf16")),
    ],
)
def test_ranks_give_the_same_logits(single: dict, ranks: int, k: int, options: tuple, tmp_path: Path) -> None:
    words = (*QUICK, "--streams-per-gpu", k, *options, "--verify")
    result, said = answered(tmp_path / "a.json", *words, ranks=ranks)
    assert relative(torch.tensor(result["logits"]), torch.tensor(single["logits"])) < result["limit"]
    assert result["limit"] == 1e-5 or "bf16" in options
    assert result["world_size"] == ranks
    assert len(result["placement"]["lanes"]) == ranks
    assert all(lane["threads"] >= 1 for lane in result["placement"]["lanes"])
    assert said.count("Placement") == 1, "rank 0 alone prints"
    assert "waiting" in result["stages_ms"][0]


@pytest.mark.skipif("openvino" not in OPTIONAL, reason="there is nothing to choose without OpenVINO")
def test_one_process_chooses_its_placement(single: dict, tmp_path: Path) -> None:
    result, said = answered(tmp_path / "a.json", *QUICK, "--placement", "auto", "--verify")
    assert relative(torch.tensor(result["logits"]), torch.tensor(single["logits"])) < 1e-5
    chosen = result["placement"]["lanes"]
    assert f"{len(chosen)} lane(s) of {chosen[0]['threads']} thread(s)" in said.splitlines()[0]
    assert result["start_up_s"].keys() >= {"load", "fold", "warm-up", "first answer"}
    assert all(seconds > 0 for seconds in result["start_up_s"].values())


@pytest.mark.parametrize(("asked", "warmed"), [(4, 4), (32, 10)])
def test_warming_up_takes_the_first_request(asked: int, warmed: int, here: Callable, monkeypatch) -> None:
    """And its time is told; where the pictures or the labels are not there, nothing is compiled."""
    shapes, warm_up = [], Engine.warm_up
    monkeypatch.setattr(Engine, "warm_up", lambda self, x: shapes.append(x.shape) or warm_up(self, x))
    for words in (("--image", "absent.png"), ("--labels", "README.md")):
        assert here("infer", *QUICK, "-b", asked, *words).returncode == 2 and not shapes
    run = here("infer", *QUICK, "-b", asked)
    assert run.returncode == 0 and shapes == [(warmed, 3, 32, 32)], run.stderr
    assert re.search(r"start-up, ms: .*fold [\d.]+, warm-up [\d.]+, first answer [\d.]+; then", run.stdout)


@pytest.mark.ranks
@pytest.mark.skipif("openvino" not in OPTIONAL, reason="says what takes the place of native")
@pytest.mark.parametrize("ranks", [0, 3])
def test_one_line_says_why_native_cannot_be_had(ranks: int, tmp_path: Path) -> None:
    for folder in ("kernels", "launch", "parallel_parnet", "profiling"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("*.so"))
    run = launch(tmp_path / "launch" / "infer.py", *QUICK, ranks=ranks, cwd=tmp_path)
    assert run.stderr.count("native") == 1, run.stderr
    assert "note: executor openvino runs, since native cannot be had: the CPU kernels were not compiled: " in run.stderr


def test_rounding_stays_small_with_random_weights() -> None:
    torch.manual_seed(0)
    program = fold(fit_norms(create_model("parnet_s")))
    even = torch.stack([Preprocess.of(program.config)(path) for path in find_images([DEMO / "pictures"])[:2]])
    expected = Engine(program, device="cpu", executor="reference")(even)
    for executor in ("eager", *OPTIONAL):
        found = Engine(program, device="cpu", executor=executor)(even)
        assert relative(found, expected) < tolerance(torch.float32, 0.0), executor


@pytest.mark.skipif("native" not in OPTIONAL, reason="the CPU kernels were not compiled")
def test_an_instruction_set_by_name(tmp_path: Path) -> None:
    name = objects.runnable()[-1]
    result, _ = answered(tmp_path / "a.json", *QUICK, "--verify", environment={"PARNET_ISA": name})
    assert (result["executor"], result["isa"]) == ("native", name)
    for executor in ("auto", "native"):
        run = launch("infer.py", *QUICK, "--executor", executor, environment={"PARNET_ISA": "avx3"}, status=2)
        assert one_line(run.stderr).startswith("error: PARNET_ISA=avx3: there is no such instruction set; choose one")


@pytest.mark.ranks
def test_ranks_on_a_golden_checkpoint(tmp_path: Path) -> None:
    words = ("--checkpoint", GOLDEN / "official_narrow_silu.pth.tar", "--ema", "--img-size", 96, "--verify")
    result, _ = answered(tmp_path / "a.json", *QUICK, *words, "--image", DEMO / "pictures", ranks=3)
    assert result["size"] == 96
    assert len(result["logits"][0]) == 1000
    assert result["predictions"][0]["top5"][0]["label"].startswith("class ")


def one_line(run_stderr: str) -> str:
    """The one line of error that the script, not torchrun, wrote."""
    lines = [line for line in run_stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, run_stderr
    return lines[0]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (2, ("--streams-per-gpu", 1), "do not cover 3 streams"),
        (4, ("--streams-per-gpu", 1), "at most 3 ranks"),
        (3, ("--image", "README.md"), "not a picture"),
        (3, ("--checkpoint", "absent.pth.tar"), "no such checkpoint"),
    ],
)
def test_bad_input_with_ranks(ranks: int, arguments: tuple, message: str) -> None:
    run = launch("infer.py", *QUICK, *arguments, ranks=ranks, timeout=60, status=1)
    assert message in one_line(run.stderr)
    for rank in range(ranks):
        assert f"rank {rank}" not in run.stdout
    assert "exitcode  : 2" in run.stderr, "torchrun's summary tells the ranks' status"
    assert "exitcode  : 1 " not in run.stderr


def test_a_bad_picture_in_a_folder(tmp_path: Path, here: Callable) -> None:
    good = sorted((DEMO / "pictures").glob("*.png"))[:2]
    for picture in good:
        shutil.copy(picture, tmp_path)
    (tmp_path / "bad.png").write_bytes(good[0].read_bytes()[:-30])
    (tmp_path / "text.jpg").write_text("hello")
    Image.open(good[0]).convert("RGB").save(tmp_path / "z.webp")
    result, said = answered(tmp_path / "a.json", *QUICK, "--image", tmp_path, "--verify", "-b", 2, status=1)
    assert [Path(row["image"]).name for row in result["predictions"]] == [p.name for p in good] + ["z.webp"]
    assert [Path(row["image"]).name for row in result["skipped"]] == ["bad.png", "text.jpg"]
    assert "skipped" in said
    for name in [p.name for p in good] + ["z.webp"]:
        (tmp_path / name).unlink()
    run = here("infer", *QUICK, "--image", tmp_path)
    assert run.returncode == 2
    assert "none of 2 pictures" in one_line(run.stderr)


NO_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "1", "RANK": "3"}, "RANK='3' in the environment: torchrun sets 0 to 0"),
        ({"WORLD_SIZE": "2", "RANK": "two"}, "RANK='two'"),
        ({"RANK": ""}, "RANK=''"),
        ({"WORLD_SIZE": "9" * 5000, "RANK": "0"}, "WORLD_SIZE='999"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2' in the environment without RANK"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "1"}, "LOCAL_RANK='1'"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE='0'"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_ranks_that_cannot_be(environment: dict, message: str, monkeypatch: pytest.MonkeyPatch, here: Callable) -> None:
    for name in NO_RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = here("infer", *QUICK)
    assert run.returncode == 2
    assert message in one_line(run.stderr)
    assert here("plan", "--help").returncode == 0, "what needs no rank goes on"


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.ranks)])
def test_a_launcher_that_sets_no_local_ranks(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NO_RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))

    def start(rank: int) -> subprocess.CompletedProcess:
        return launch("infer.py", *QUICK, "--streams-per-gpu", 2, environment={"RANK": str(rank)})

    with ThreadPoolExecutor(world) as pool:
        runs = list(pool.map(start, range(world)))
    assert f"{world} rank(s)" in runs[0].stdout


@pytest.fixture
def checkpoint_gone_mad(tmp_path: Path) -> Path:
    """Weights that are finite, and give logits that are not."""
    model = load_checkpoint(DEMO / "parnet_fashion.safetensors")
    with torch.no_grad():
        for block in model.streams[0]:
            block.block.rbr_dense.bn.weight *= 1e15
    save_checkpoint(model, tmp_path / "mad.safetensors")
    return tmp_path / "mad.safetensors"


def test_logits_that_are_no_numbers(checkpoint_gone_mad: Path, tmp_path: Path, here: Callable) -> None:
    options = ("--device", "cpu", "--checkpoint", checkpoint_gone_mad)
    run = here("infer", *options, "--verify")
    assert run.returncode == 2
    assert "none of 10 pictures has an answer" in one_line(run.stderr) and "non-finite" in run.stderr
    assert "nan" not in run.stdout and "equal" not in run.stdout
    assert here("infer", *options, "--jsonl", tmp_path / "answers.jsonl").returncode == 1
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and all("non-finite" in row["reason"] for row in rows)


def test_a_comparison_with_nan_fails(tmp_path: Path) -> None:
    """Whatever makes an executor's logits NaN, `verify` is no place that lets them pass."""
    program = fold(load_checkpoint(DEMO / "parnet_fashion.safetensors"))
    images = [str(path) for path in find_images([DEMO / "pictures"])]
    pictures = Pictures.at([Path(image) for image in images], 1, Preprocess.of(program.config))
    found = Answers(images, [torch.full((10,), torch.nan)] * len(images))
    int8, _ = quantised(program, argparse.Namespace(calibrate=OF_DEMO))
    for ran, dtype in ((program, torch.float32), (program, torch.bfloat16), (int8, torch.float32)):
        checked = verify(Engine(ran, device="cpu", dtype=dtype, executor="eager"), program, pictures, found)
        assert not checked.error <= checked.limit
    assert tolerance_quantised(float("inf")) == 1.0, "whatever int8 itself makes NaN is no excuse"
    write_json(tmp_path / "a.json", {"error": checked.error, "rows": [(torch.nan, 1.5)]})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "error": "inf", "rows": [["nan", 1.5]],
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_difference_ends_with_its_status(dtype: str, monkeypatch: pytest.MonkeyPatch, here: Callable) -> None:
    """Also where each quantised operation by itself is right."""
    monkeypatch.setattr(few, "verify", lambda *_: Verified(1.0, 0.5, 1e-5, 1e-3))
    run = here("infer", *QUICK, "--executor", "eager", "--dtype", dtype, "--verify")
    assert run.returncode == 1 and "verify: DIFFERENT: largest difference" in run.stdout


def test_random_weights_show_no_classes(tmp_path: Path) -> None:
    result, said = answered(tmp_path / "a.json", *QUICK, "--model", "parnet_cifar_1m")
    assert "only the times mean anything" in " ".join(said.split()) and "Top 5" not in said
    assert len(result["predictions"]) == 10
