"""The benchmark: its statistics on data with a known answer, what it refuses, its files, and a small run of it all."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import launch
from contenders import HEADER, QUIET, planted, result, subject
from parallel_parnet import Config, Engine, ParNetError, fold
from parallel_parnet.commands import processes
from parallel_parnet.commands.bench import command as bench
from parallel_parnet.commands.bench import ours, overhead, proof
from parallel_parnet.commands.bench import page as bench_report
from parallel_parnet.commands.bench.fused import fuse
from parallel_parnet.commands.bench.machine import describe
from parallel_parnet.commands.bench.measure import Settings, contenders, measure, worth_timing
from parallel_parnet.commands.bench.rows import (
    SHARES,
    _achieved,
    compared,
    reached,
    read,
    relation,
    result_name,
    row_of,
    runs,
    write,
)
from parallel_parnet.commands.bench.running import Entry, interleave, set_up, spread
from parallel_parnet.commands.bench.subject import Contender, Runner, Subject
from parallel_parnet.commands.common import typed
from parallel_parnet.commands.ending import run
from small import SMALL, lively, relative


def test_few_or_unstable_runs_claim_nothing() -> None:
    rng = np.random.default_rng(2)
    rows = result({"ours: eager": rng.normal(8, 0.1, 50), "a peer": rng.normal(10, 0.1, 50)})["rows"]
    assert relation(rows[1], rows).endswith("), ours faster") and relation(rows[0], rows) == ""
    shaky = [rows[0], rows[1] | {"unstable": ["times vary by 9.0%"]}]
    assert relation(shaky[1], shaky).endswith("), ours faster as far as unstable times tell")
    few = result({"ours: eager": rng.normal(8, 0.1, 50), "a peer": rng.normal(10, 0.1, 7)})["rows"]
    assert relation(few[1], few).endswith("), too few runs to say")


def test_the_best_is_not_the_luckiest_of_few_runs() -> None:
    """A row of few runs is the best only where there is no other, and says how few they are."""
    lucky, many = np.full(7, 1.0), np.full(20, 2.0)
    rows = result({"ours: a": lucky, "ours: b": many, "peer": lucky})["rows"]
    found = [compared(rows, ours) for ours in (True, False)]
    assert [row and row["contender"] for row in found] == ["ours: b", "peer"]
    assert [runs(row) for row in rows] == ["7 (too few)", "20 (few)", "7 (too few)"]
    rows = result({"ours: native": many, "ours: auto": many + 1, "peer": many})["rows"]
    assert [row and row["contender"] for row in (compared(rows, True), compared(rows, False))] == ["ours: auto", "peer"]
    assert runs({"n": 50}) == "50"


def test_no_share_of_a_product_slower_than_that_of_fp32() -> None:
    """torch's product in int8 is a loop where the machine has no instructions for it: a share of it tells nothing."""
    flops = {"float32": 1e11, "int8": 1e9}
    possible = {kind: {"flop_per_s": rate, "bytes_per_s": 1e10} for kind, rate in flops.items()}
    slow, fp32 = (_achieved(subject(), kind, 1e-3, possible) for kind in ("int8", "float32"))
    assert slow["of_matmul"] is None and "%" not in reached(slow, *SHARES[0]) and "%" in reached(fp32, *SHARES[0])
    possible["int8"]["flop_per_s"] = 2e11
    assert _achieved(subject(), "int8", 1e-3, possible)["of_matmul"] > 0


def test_a_row_by_hand() -> None:
    """Passes of two pictures, which took 1 to 5 ms."""
    two, ms = replace(subject(), batch=2), [1.0, 2.0, 3.0, 4.0, 5.0]
    seconds, unknown = [t / 1e3 for t in ms], [float("nan")] * 5
    entry = Entry(
        planted("x", 0), two, Runner(id, "", "float32"), error=0.0, rounds=list(range(5)), latency=seconds,
        enqueue=unknown, device=unknown,
    )  # fmt: skip
    row, program, median_s = row_of(entry, HEADER["possible"], []), two.program, 3e-3
    flops, bytes_moved = program.cost(64, 2).flops, program.cost(64, 2, 4).bytes
    assert (row["infer_step_time"], row["n"], row["samples_ms"]) == (3.0, 5, ms)
    assert row["infer_samples_per_sec"] == pytest.approx(2 / median_s, abs=1e-3)
    assert row["infer_gmacs"] == pytest.approx(flops / 2 / 2 / 1e9, abs=5e-4)
    assert row["gflop_per_s"] == pytest.approx(flops / median_s / 1e9, abs=5e-3)
    assert row["of_matmul"] == pytest.approx(flops / median_s / 1e11, abs=5e-5)
    assert row["gb_per_s"] == pytest.approx(bytes_moved / median_s / 1e9, abs=5e-3)
    assert row["of_copy"] == pytest.approx(bytes_moved / median_s / 1e10, abs=5e-5)
    low, high = row["median_interval_ms"]
    assert 1 <= low < 3 < high <= 5
    possible = {kind: {"flop_per_s": 1e11, "bytes_per_s": 1e10} for kind in ("float32", "bfloat16")}
    half = _achieved(two, "bfloat16", median_s, possible)
    assert half["gb_per_s"] == pytest.approx(program.cost(64, 2, 2).bytes / median_s / 1e9, abs=5e-3)


def test_a_first_call_that_compiles_is_told_from_the_next() -> None:
    pauses = iter([0.1])

    def build(subject: Subject) -> Runner:
        return Runner(lambda x: time.sleep(next(pauses, 0.0)) or x, "", "float32")

    found = set_up(Contender("x", False, build), subject(), [x := torch.ones(1, 10)] * 2, [x] * 2)
    assert found.first_call >= 0.1 and found.second_call > 0


def test_a_peer_that_fails_once_it_was_compared_loses_its_own_row_only() -> None:
    lucky = iter([True, True, False])

    def call(x: torch.Tensor) -> torch.Tensor:
        if not next(lucky):
            raise OSError("compiled anew, to a file too short")
        return x

    contender = Contender("x", False, lambda _: Runner(call, "", "float32"))
    found = set_up(contender, subject(), [x := torch.ones(1, 10)] * 2, [x] * 2)
    assert found.runner is None and found.missing == "failed: OSError: compiled anew, to a file too short"


def test_options_of_runs_reach_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []

    def measured(subject: Subject, header: dict, chosen: list, settings: Settings, console: object) -> dict:
        asked.append(settings)
        raise ParNetError("as planted")

    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr(bench, "possible", lambda *_: HEADER["possible"])
    words = ("--runs", "5", "--warmup", "2", "--budget", "7.5", "--device", "cpu", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    with pytest.raises(ParNetError, match="as planted"):
        bench.main()
    assert asked == [Settings(runs=5, least=5, warm_up=2, budget=7.5)]


def test_turns_are_taken() -> None:
    order: list[str] = []

    def entry(name: str) -> Entry:
        return Entry(Contender(name, False, None), subject(), Runner(lambda x: order.append(name), "", ""))  # type: ignore[arg-type]

    entries, ticks = [entry("a"), entry("b")], []
    interleave(entries, [4, 2], lambda: ticks.append(1))
    assert sorted(order[:2]) + order[2:3] + sorted(order[3:5]) + order[5:] == list("abaaba"), "round by round"
    assert entries[0].rounds == [0, 1, 2, 3]
    assert entries[1].rounds == [0, 2]
    assert len(ticks) == 4


@pytest.mark.parametrize("rounds", [1, 2, 7, 15, 50])
def test_few_turns_are_spread(rounds: int) -> None:
    """15 of 50 runs and 7 of 50 fell into rounds of which none was the same, when each had them evenly by itself."""
    turns = spread(rounds)
    assert sorted(turns) == list(range(rounds))
    for count in range(1, rounds + 1):
        taken = [-1, *(r for r in range(rounds) if turns[r] < count), rounds]
        assert max(b - a for a, b in pairwise(taken)) <= 2 * (rounds + 1) // count + 1


def test_a_peer_that_disagrees_is_not_compared() -> None:
    def fails(subject: Subject) -> Runner:
        raise RuntimeError("out of luck\nand of more")

    def late(subject: Subject) -> Runner:
        right, wrong, pictures = planted("", 0).build(subject), planted("", 0.1).build(subject), itertools.count()
        return replace(right, call=lambda x: (wrong if next(pictures) else right).call(x))

    (eager,) = contenders(["ours: eager"])
    off = 1.02e-4  # of which a sum's rounding may take or add a hundredth
    peers = [planted("right", 0), planted("wrong", off), planted("nan", float("nan")), Contender("bad", False, fails)]
    peers.append(Contender("late", False, late))
    found = measure(subject(), HEADER, [eager, *peers], Settings(runs=3, least=3, warm_up=1), QUIET)
    assert [row["contender"] for row in found["rows"]] == ["ours: eager", "right"]
    assert found["disagree"].keys() == {"wrong", "nan", "late"}
    assert "off by 1.0e-04" in found["disagree"]["wrong"]
    assert found["missing"] == {"bad": "failed: RuntimeError: out of luck"}
    low, high = found["rows"][1]["ratio"][1:]
    assert 0 < low <= high
    json.dumps(found, allow_nan=False)


@pytest.mark.usefixtures("_one_core")
def test_parity_failure_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    class Wrong(Engine):
        def __call__(self, x_nchw: Tensor) -> Tensor:
            logits = super().__call__(x_nchw)
            return logits + 1e-3 * logits.norm() * nn.functional.one_hot(torch.tensor([1]), 10)

    monkeypatch.setattr(ours, "Engine", Wrong)
    monkeypatch.setattr(bench, "possible", lambda device, dtype: HEADER["possible"])
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", "ours: eager", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        run(bench.main)
    assert left.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()[-1]
    assert errors.startswith("error: parity fails, so nothing is timed: ours: eager is off by 1.0e-03")
    assert not list(tmp_path.iterdir())


def test_contenders_that_cannot_be_had_are_no_result(tmp_path: Path, here: Callable) -> None:
    run = here("bench", "--only", "TensorRT", "--device", "cpu", "--runs", 2, "--out", tmp_path)
    assert run.returncode == 2 and "nothing was timed" in run.stderr and "TensorRT: " in run.stdout
    (file,) = tmp_path.glob("*.json")
    assert list(read(file)["missing"]) == ["TensorRT"], "where --isolate finds it"


def test_golden_files_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proof.prove_golden()


def test_other_parity_failures_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = subject()
    other = fold(lively(SMALL, 1))
    with pytest.raises(ParNetError, match="the folded network is off"):
        measure(replace(right, program=other), HEADER, [planted("x", 0)], Settings(), QUIET)
    monkeypatch.setattr(proof, "GOLDEN", tmp_path)
    with pytest.raises(ParNetError, match="no golden files"):
        measure(right, HEADER, [planted("x", 0)], Settings(), QUIET)


@pytest.mark.usefixtures("_one_core")
def test_one_of_ours_that_fails_is_told_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """With an exit status that says so."""

    class Broken(Engine):
        def __init__(self, *given: object, **named: object) -> None:
            raise RuntimeError("a defect\nand more")

    monkeypatch.setattr(ours, "Engine", Broken)
    monkeypatch.setattr(bench, "possible", lambda device, dtype: HEADER["possible"])
    only = ("--only", "ours: eager", "eager, fused", "--runs", "3", "--device", "cpu", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["bench.py", *only])
    assert bench.main() == 1
    said = capsys.readouterr().out
    assert "failed: ours: eager: RuntimeError: a defect" in said
    assert json.loads(said.splitlines()[-1])["failed"] == ["ours: eager"]
    (file,) = tmp_path.glob("*.json")
    found = read(file)
    assert [row["contender"] for row in found["rows"]] == ["eager, fused"] and found["failed"] == ["ours: eager"]
    assert found["missing"] == {"ours: eager": "failed: RuntimeError: a defect"}


def test_slow_contenders_are_listed() -> None:
    runner = Runner(lambda x: x, "", "")
    seconds = {"fast": 0.2, "fair": 1.9, "slow": 2.1}
    entries = [
        Entry(Contender(name, False, None), subject(), runner, second_call=s, error=0.0)  # type: ignore[arg-type]
        for name, s in seconds.items()
    ]
    assert [entry.name for entry in worth_timing(entries)] == ["fast", "fair"]
    assert "2.10 s a pass" in entries[2].missing


def test_fused_network_is_the_same() -> None:
    model = lively(Config((8, 16, 32, 64), activation="relu"), 3)
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected, got = model(x), fuse(model)(x)
    assert relative(got, expected) < 1e-5
    convolutions = [m for m in fuse(model).modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 22


def test_overhead_is_what_the_library_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def work(self) -> None:
            time.sleep(0.02)

    library = Library()
    monkeypatch.setitem(sys.modules, "planted_library", SimpleNamespace(Library=Library))
    monkeypatch.setattr(overhead, "HANDED_TO", (("planted_library", "Library", "work"),))

    def call(x: Tensor) -> None:
        time.sleep(0.003)
        library.work()

    wait = id
    found = overhead.host_overhead(call, wait, [torch.zeros(1)], 5)
    assert found is not None and 0.003 <= found < 0.02
    assert overhead.host_overhead(lambda x: None, wait, [torch.zeros(1)], 5) is None
    assert overhead.host_overhead(lambda x: (call(x), call(x)), wait, [torch.zeros(1)], 5) is None
    assert Library.work.__name__ == "work"  # as it was


def test_names_of_files() -> None:
    header = {"torch": "2.13.0+cpu", "machine": "NVIDIA H200", "model": "parnet_xl", "size": 224}
    header |= {"dtype": "bfloat16", "batch_size": 1}
    assert result_name("bench-infer", header) == "bench-infer-parnet_xl-224-bf16-b1-nvidia-h200-torch2.13"
    header |= {"dtype": "int8", "machine": "2-core x86-64 (AVX512)"}
    assert result_name("bench-infer", header) == "bench-infer-parnet_xl-224-int8-b1-2-core-x86-64-avx512-torch2.13"


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(2)
    made = result({"ours: eager": rng.normal(8, 0.1, 50), "a peer": rng.normal(10, 0.1, 20)})
    path = write(made, tmp_path, "one")
    monkeypatch.setattr(sys, "argv", ["bench_report.py", str(path), str(path)])
    assert bench_report.main() == 0
    text = Path(capsys.readouterr().out.strip()).read_text()
    assert "| **ours: eager** | float32 |" in text
    assert "ours faster" in text and "| 0.30 |" in text, "set-up and first call"
    assert "not here: absent: not installed" in text
    figure = path.with_name("latency-by-peer-2-core-x86-64-avx2.svg").read_text()
    assert figure.count("<!-- a peer -->") == 2  # a panel for each result
    assert "(n = 20)" in figure
    assert "2-core x86-64 (AVX2)" in figure
    other = write(result({"ours: eager": np.ones(5)}, machine="another"), tmp_path, "other")
    monkeypatch.setattr(sys, "argv", ["bench_report.py", str(path), str(other)])
    with pytest.raises(ParNetError, match="results of 2 machines"):
        bench_report.main()


@pytest.mark.usefixtures("_one_core")
def test_the_whole(tmp_path: Path) -> None:
    """Every peer that is installed, but for torch.compile, whose compilation takes longer than all the others, and
    some in one form instead of three. (ONNX Runtime in ours: torch's export takes as long as all the rest.)"""
    peers = ["eager", "eager, channels_last", "eager, fused", "OpenVINO", "ONNX Runtime, exported", "TensorRT"]
    arguments = ("--runs", 4, "--warmup", 1, "--device", "cpu", "--out", tmp_path)
    done = launch("bench.py", *arguments, "--only", "ours: auto", "ours: eager", "ours: openvino", *peers)
    (file,) = tmp_path.glob("*.json")
    torch_version = ".".join(torch.__version__.split(".")[:2])
    assert file.name.startswith("bench-infer-parnet_fashion-32-fp32-b1-")
    assert file.name.endswith(f"-torch{torch_version}.json")
    written = read(file)
    names = {row["contender"] for row in written["rows"]}
    slow = {name for name, why in written["missing"].items() if why.startswith("too slow")}  # on a busy machine
    assert {"ours: eager", "eager", "eager, channels_last", "eager, fused"} <= names | slow
    for name, package in (("OpenVINO", "openvino"), ("ONNX Runtime, exported", "onnxruntime")):
        assert (name in names | slow) == (importlib.util.find_spec(package) is not None), written["missing"]
    assert written["missing"]["TensorRT"] == "needs an NVIDIA GPU"
    assert written["disagree"] == {}
    for row in written["rows"]:
        assert row["n"] == 4 == len(row["samples_ms"])
        assert row["error"] < 1e-5
        assert row["first_call_s"] > 0
        assert ("ratio" in row) != row["ours"]
    for key in ("torch", "python", "commit", "date", "threads", "command", "possible"):
        assert written["header"][key]
    last = json.loads(done.stdout.splitlines()[-1])
    assert list(last)[:7] == [
        "model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "param_count",
        "infer_gmacs",
    ]  # fmt: skip
    assert last["ratio"][1] <= last["ratio"][0] <= last["ratio"][2]
    rows = list(csv.reader(file.with_suffix(".csv").read_text().splitlines()))
    assert rows[0][:7] == list(last)[:7]
    assert len(rows) == len(names) + 1
    assert "4 runs are few" in done.stdout
    if "ours: openvino" in names:
        (own,) = (row for row in written["rows"] if row["contender"] == "ours: openvino")
        assert 0 < own["overhead_us"] < own["infer_step_time"] * 1e3
        (chosen,) = (row for row in written["rows"] if row["contender"] == "ours: auto")
        assert "lane(s) of" in chosen["settings"], "what warm_up chose"


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino_in_fp16_on_a_cpu() -> None:
    """Which takes bf16 for it where the CPU has no instructions for fp16."""
    (openvino,) = contenders(["OpenVINO, exported"])
    pictures, logits = [torch.randn(1, 3, 64, 64)] * 2, [torch.ones(1, 10)] * 2
    found = set_up(openvino, replace(subject(), dtype=torch.float16), pictures, logits)
    if found.runner is None:
        assert found.missing == "computes in bfloat16 here, asked for float16"
    else:
        assert found.runner.arithmetic in ("float16", "float32")


def test_the_header_of_an_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no scripts to type, and no commit, not even where it lies in somebody's repository."""
    monkeypatch.setattr(sys, "argv", ["/clone/launch/bench.py", "--only", "ours: eager"])
    assert typed() == "python launch/bench.py --only 'ours: eager'"
    monkeypatch.setattr(sys, "argv", ["parnet bench", "--only", "ours: eager"])
    assert typed() == "parnet bench --only 'ours: eager'"
    assert describe(torch.device("cpu"))["commit"]
    monkeypatch.setattr(processes, "CLONE", False)
    assert describe(torch.device("cpu"))["commit"] is None
