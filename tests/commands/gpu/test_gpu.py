"""The scripts for a GPU, as far as they go without one: comparisons, reports, the choice of a winner.

The doubles stand for what only a GPU can do: times, and kernels that are right, wrong or refused.
"""

from __future__ import annotations

import io
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from conftest import launch
from parallel_parnet import Engine, ParNetError, Placement, fold
from parallel_parnet.commands.gpu import level_tuning as tuning
from parallel_parnet.commands.gpu import page as gpu_report
from parallel_parnet.commands.gpu import parity, placements, timing, tune
from parallel_parnet.commands.gpu import proofs as checks
from parallel_parnet.commands.gpu.precompile import (
    KernelCase,
    NetworkCase,
    Target,
    compile_all,
    jobs_of,
    shapes_of,
)
from parallel_parnet.commands.gpu.scope import CONFIGS
from parallel_parnet.kernels.gpu import config, twins
from parallel_parnet.kernels.gpu.candidates import candidates, launched, resident
from parallel_parnet.kernels.gpu.config import LevelConfig, Table
from parallel_parnet.kernels.gpu.convolution import E4M3, outputs
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile
from parallel_parnet.kernels.gpu.model import floor
from parallel_parnet.kernels.gpu.rates import H200
from parallel_parnet.kernels.gpu.samples import GATED, KINDS, convolution, geometry
from small import SMALL, lively

HALF = torch.float16
XL_LEVEL_5 = tuple(Geometry(side, side, c, c, gate="identity") for c, side in ((200, 56), (400, 28), (800, 14)))
LEVEL = tuning.Level(XL_LEVEL_5, 1, HALF)


def test_without_a_gpu_one_line_says_so(tmp_path, here):
    for command, arguments in (("tune", ()), ("gpu-check", ("--out", tmp_path / "out"))):
        done = here(command, *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


# --- parity


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(dtype, kind) for dtype in parity.ROUNDING for kind in (GATED if dtype == E4M3 else KINDS)],
    ids=str,
)
def test_a_right_kernel_passes(dtype, kind):
    conv = convolution(geometry(kind, 9, 7, 20), Tile(16, 16, 16), 2, dtype, seed=torch.seed() % 2**31)
    parity.poison(conv)
    twins.fused_conv(conv)
    assert parity.deviation(conv) <= 1


@pytest.mark.parametrize("kind", ["identity", "picture", "residual"])
def test_all_that_a_kernel_must_write_is_poisoned(kind):
    conv = convolution(geometry(kind, 9, 7, 20), Tile(16, 16, 16, split_k=2), 2, HALF, seed=3)
    written = {name: getattr(conv.x, name).zero_() for name in outputs(conv.shape, conv.tile, 2, HALF)}
    parity.poison(conv)
    assert all(t.isnan().all() if t.is_floating_point() else not t.any() for t in written.values())


@pytest.mark.parametrize(("dtype", "off"), [(HALF, 0.1), (E4M3, 40.0)], ids=str)
@pytest.mark.parametrize("fault", ["one value", "unwritten", "one sum", "unwritten sum"])
def test_a_wrong_kernel_fails(fault, dtype, off):
    conv = convolution(geometry("identity", 9, 7, 20), Tile(16, 16, 16), 2, dtype, seed=3)
    twins.fused_conv(conv)
    target = conv.x.sums if "sum" in fault else conv.x.y
    target.view(-1)[7] = float("nan") if "unwritten" in fault else float(target.view(-1)[7]) + off
    assert parity.deviation(conv) > 1


def test_networks_are_compared(monkeypatch):
    monkeypatch.setitem(CONFIGS, "small", SMALL)
    program, other = (fold(lively(SMALL, seed)) for seed in (1, 2))
    first, second = (
        Engine(p, Placement.single(p), torch.device("cpu"), executor="reference") for p in (program, other)
    )
    device = torch.device("cpu")
    half = Engine(program, Placement.single(program), device, torch.bfloat16, "eager")
    case = NetworkCase("small", torch.bfloat16, 2)
    row = checks.compare(case, half, half, first, device)
    assert 0 < row["error"] == row["error_of_torch"] <= row["tolerance"]
    for wrong in (second, lambda x: first(x) * 1.05, lambda x: first(x) * float("nan")):
        row = checks.compare(case, wrong, half, first, device)
        assert row["error"] > row["tolerance"]


def test_executors_are_used_as_callers_do():
    program, other = (fold(lively(replace(SMALL, image_size=64), seed)) for seed in (1, 2))
    device = torch.device("cpu")
    first, second = (Engine(p, Placement.single(p), device, executor="reference") for p in (program, other))
    engine = Engine(program, None, device, torch.bfloat16, "eager")
    row = checks.use(engine, first)
    assert row["right"] and 0 < row["error"] <= row["tolerance"]
    row = checks.use(engine, second)
    assert row["right"] and row["error"] > row["tolerance"]

    class Lending(Engine):
        """Gives the same buffer to every caller."""

        lent = torch.zeros(1, SMALL.num_classes)

        def __call__(self, x_nchw, out=None):
            return self.lent.copy_(super().__call__(x_nchw, out))

    assert not checks.use(Lending(program, None, device, torch.bfloat16, "eager"), first)["right"]


def test_repeats_are_counted():
    logits, runs = torch.zeros(3), itertools.count()
    assert checks.repeat(lambda: logits.fill_(2.0), logits, 10) == {"runs": 10, "different": 0, "finite": True}
    assert checks.repeat(lambda: logits.fill_(next(runs) % 5 == 4), logits, 10)["different"] == 2
    assert checks.repeat(lambda: None, logits, 10)["different"] == 10, "NaN differs from itself"


# --- report


def test_report(tmp_path):
    spread = {"p20": 9.0, "p50": 10.0, "p80": 12.0, "n": 100}
    level = {"level": "level 1", "us": spread, "computed_floor_us": 4.0}
    levels = {"name": "parnet_s bfloat16", "network": "parnet_s", "dtype": "bfloat16", "launches": 12,
              "us": {"grouped": spread}, "levels": [level], "computed_floor_us": 5.0}  # fmt: skip
    results = {
        "machine": [{"name": "machine", "gpu": "Some GPU"}, {"name": "rates, bfloat16", "bytes": 1e12, "flops": 5e12}],
        "first": [{"name": "parnet_s level 1", "deviation": 0.5}, {"name": "parnet_s replay", "us": spread}],
        "probes": [{"name": "gap, 1 programs", "us": spread}, {"name": "read of L2", "us": 80.0, "tb_per_s": 5.5},
                   {"name": "parnet_s level", "warm_us": spread, "cold_us": spread}],
        "tuning": [{"name": "level", "l2": "warm", "default_us": spread, "us": spread, "timed": 2, "refused": ["no"]},
                   {"name": "other", "fault": "no configuration passed"}],
        "tuned": [{"name": "parnet_s, 1 levels tuned", "us": {"default": spread, "tuned": spread}}],
        "networks": [{"name": "parnet_s", "network": "parnet_s", "dtype": "float16", "n": 1, "error": 3e-3,
                      "error_of_torch": 1e-3, "tolerance": 2e-3}],
        "placements": [{"name": "lanes", "network": "parnet_s", "same_bits": True, "difference": 1e-3,
                        "us": {"cuda_graph, 3 lane(s)": spread}},
                       {"name": "ranks", "network": "parnet_s", "difference": 2e-3,
                        "median_ms": {"1 rank(s)": 0.5, "3 rank(s)": 1.5}}],
        "auto": [{"name": "parnet_s", "network": "parnet_s", "executor": "cuda_graph",
                  "tried_ms": {"cuda_graph, whole": 0.1}, "dropped": ["triton, whole: no"], "kept": True}],
        "timings": [levels],
        "fp8": [{"name": "parnet_s level 2", "deviation": 0.25}, {"name": "parnet_s pass", "us": {"fp8": spread}},
                {"name": "parnet_s logits", "error": 0.02, "error_of_fp8": 0.03, "tolerance": 0.042}],
        "poster": [{"name": "resnet34", "contender": "a graph", "ms": 0.25, "timed_by": "CUDA events"}],
        "depth": [{"name": "published", "members": [{"network": "parnet_m", "executor": "cuda_graph", "depth": 12,
                                                     "gflops": 1.5, "median_ms": 0.2}]}],
        "sanitizer": [],
    }  # fmt: skip
    told = {
        "networks": {"passed": False, "seconds": 1.0, "worst": 1.5, "left_out": 2},
        "tuning": {"faults": ["no configuration passed"], "table": "tuned.Some_GPU.json"},
        "sanitizer": {"passed": False, "seconds": 3.0, "fault": "exit status 1: no", "said": "a trace"},
    }
    results = {
        name: {"passed": True, "seconds": 9.0, **told.get(name, {}), "rows": rows} for name, rows in results.items()
    }
    verdicts = {row[0]: row for row in gpu_report.verdicts(results)}
    assert verdicts["machine"] == ("machine", "passed", "9", "Some GPU, 1.000 TB/s, 5.0 TFLOP/s")
    assert verdicts["networks"] == ("networks", "FAILED", "1", "1 networks, worst 1.5 of the tolerance, 2 left out")
    assert verdicts["placements"][3] == "differences up to 2.0e-03"
    assert verdicts["tuning"][3] == "1 levels, in tuned.Some_GPU.json, 1 failed"
    text, words = gpu_report.markdown(results, "dry run"), "10.0 (9.0 to 12.0)"
    for line in (
        "# GPU check: dry run", "gpu Some GPU", "| parnet_s level 1 | 0.5 |  |  |", "| read of L2 | 80 | 5.5 |  |  |",
        f"| gap, 1 programs | {words} |  |  |  |", f"| parnet_s level |  |  | {words} | {words} |",
        f"| level | warm | {words} | {words} | 2 | 1 |", "| tuning | other | no configuration",
        "| network | dtype | launches | computed floor | grouped / floor | grouped |",
        f"| parnet_s | bfloat16 | 12 | 5 | 2.00 | {words} |", "| parnet_s | float16 | 1 | 0.003 | 0.001 | 0.002 |",
        f"| parnet_s | bfloat16 | level 1 | {words} | 4 | 2.50 |",
        "| parnet_s level 2 | 0.25 |  |  |  |  |", "| parnet_s logits |  | 0.02 | 0.03 | 0.042 |  |",
        "| tolerance | fp8 |", f"| parnet_s pass |  |  |  |  | {words} |",
        "exit status 1: no", "a trace", f"| parnet_s | {words} |", "| parnet_s | 0.5 | 1.5 |",
        "| network | cuda_graph, whole |", "| parnet_s | 0.1 |", "| parnet_s | triton, whole: no |",
        "| resnet34 | a graph | 0.25 | CUDA events |", "| parnet_m | cuda_graph | 12 | 1.5 | 0.2 |",
    ):  # fmt: skip
        assert line in text, line


def test_placements_are_compared():
    program, x = fold(lively(SMALL, 3)), torch.randn(1, 3, 32, 32)
    eager = Engine(program, None, "cpu", executor="eager")
    ways = {
        "cuda_graph, 1 lane(s)": eager,
        "triton, 1 lane(s)": eager,
        "cuda_streams, 1 lane(s)": lambda x: eager(x) + 1,
    }
    untimed = dict.fromkeys
    found = placements.side_by_side(ways, x, untimed)
    assert found["same_bits"] and found["difference"] == 0 and list(found["us"]) == list(ways)
    slightly, nan = (lambda x, f=f: eager(x) * f for f in (1.001, float("nan")))
    found = placements.side_by_side(ways | {"triton, 3 lane(s)": slightly}, x, untimed)
    assert found["same_bits"] and 0.9e-3 < found["difference"] < 1.1e-3
    assert not placements.side_by_side(ways | {"triton, 1 lane(s)": slightly}, x, untimed)["same_bits"]
    assert placements.side_by_side(ways | {"triton, 3 lane(s)": nan}, x, untimed)["difference"] == float("inf")


@pytest.mark.ranks
def test_ranks_are_asked_through_the_command(tmp_path):
    found = placements.infer(2, tmp_path / "a.json", time.monotonic() + 100, "parnet_fashion", "cpu", "eager")
    assert len(found["logits"]) == 10 and found["world_size"] == 2, found
    fault = placements.infer(1, tmp_path / "b.json", time.monotonic() + 100, "parnet_fashion", "cpu", "cuda_graph")
    assert "exit status 2: error: executor cuda_graph runs on NVIDIA GPUs" in fault["fault"]


def test_kernels_are_compiled_on_all_cores():
    """In processes of their own; what fails is named, what there is no time for is counted."""
    cases = [KernelCase("down", HALF, Tile(64, 32, 32)), NetworkCase("parnet_fashion", HALF, 1, index=11)]
    wrong = NetworkCase("parnet_nowhere", HALF, 1, index=0)
    target = Target((9, 0), launchers=False)
    done = compile_all(jobs_of([*cases, wrong]), target, time.monotonic() + 120)
    assert done["compiled"] == 2 and done["left_out"] == 0 and list(done["failed"]) == [str(wrong)]
    assert not done["passed"]
    late = compile_all(jobs_of(cases), target, time.monotonic())
    assert late["left_out"] == 2 and late["passed"]


# --- tuning


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_candidates_fit_and_are_ranked(dtype):
    ranked = candidates(XL_LEVEL_5, 1, dtype, H200)
    assert len(ranked) >= 4
    places = [resident(candidate.config, dtype, H200) * H200.multiprocessors for candidate in ranked]
    waits = [launched(XL_LEVEL_5, 1, c.config) > room for c, room in zip(ranked, places, strict=True)]
    order = [(wait, candidate.predicted) for wait, candidate in zip(waits, ranked, strict=True)]
    assert order == sorted(order) and order[0][1] >= floor(XL_LEVEL_5, 1, dtype, H200) and min(places) > 0


def test_the_floor_is_that_of_the_program():
    """Two ways to count the same work: by the program's cost, and by a level's shapes."""
    program = shapes_of("parnet_s")
    by_level = list(program.cost(itemsize=2).by("level").values())
    levels = tuning.levels_of(program, 1, HALF)
    assert floor(levels[2].shapes, 1, HALF, H200) == pytest.approx(
        H200.floor(by_level[2].flops, by_level[2].bytes), rel=0.05
    )
    assert timing.floors(program, H200) == [H200.floor(level.flops, level.bytes) for level in by_level]


def test_levels_that_repeat_are_tuned_once():
    program = shapes_of("parnet_s")
    levels = tuning.levels_of(program, 1, HALF)
    assert len(levels) == 10, "levels 5 and 6 are alike, and the classifier has nothing to tune"
    assert levels[4].key == tuning.Level(levels[4].shapes, 1, HALF).key


def test_what_the_kernel_for_warpgroups_runs_is_not_tuned(tmp_path, monkeypatch):
    """On an H200 in half precision at batch 1 all levels but the picture's, and said in a line."""
    table, said, given = Table.load(config.HOPPER, "NVIDIA H200", warpgroups=True), io.StringIO(), []
    header = {"gpu": "NVIDIA H200", "capability": [9, 0], "multiprocessors": 132, "date": ""}
    monkeypatch.setattr(tune, "require_gpu", lambda: torch.device("meta"))
    monkeypatch.setattr(tune, "machine", lambda device: header)
    monkeypatch.setattr(tune, "measure_rates", lambda device, dtype: H200)
    monkeypatch.setattr(tune, "tune_levels", lambda levels, *_: given.append(levels))
    monkeypatch.setattr(config.Table, "of_device", lambda device: table)
    kinds = itertools.product((1, 2), (HALF, torch.float32))
    levels = [level for n, dtype in kinds for level in tuning.levels_of(shapes_of("parnet_s"), n, dtype)]
    tune.fill_table(levels, 1, tmp_path / "out.json", Console(file=said))
    assert given == [[levels[0], *levels[10:]]]
    assert said.getvalue() == "9 of 40 levels left alone: the kernel for warpgroups runs them here\n"


def test_the_default_is_tried_first():
    table = Table.load((9, 0))
    configs = tuning.worth_trying(LEVEL, table, H200)
    assert configs[0] == table.level(XL_LEVEL_5, 1, HALF) and len(configs) == len(set(configs)) <= tuning.TRIALS


def test_the_fastest_right_configuration_wins():
    configs = [LevelConfig((Tile(64, 64, 64, split),), 4, 4) for split in (1, 2, 3, 4, 5)]
    times = {1: 3e-6, 2: 1e-6, 4: 2e-6}

    def measured(config):
        split = config.tiles[0].split_k
        if split == 3:
            raise tuning.RefusedError("wrong by 7.0 times what rounding allows")
        if split == 5:
            raise RuntimeError("out of memory")
        return [times[split]] * 3

    def compiled(config):
        return ["spills 8 bytes"] if config.tiles[0].split_k == 2 else []

    trial = tuning.tune(configs, compiled, measured, time.monotonic() + 60)
    assert trial.config == configs[3] and trial.best["p50"] == 2.0 and trial.default["p50"] == 3.0
    assert trial.timed == 2
    assert [reason.split(": ")[1] for reason in trial.refused] == [
        "spills 8 bytes", "wrong by 7.0 times what rounding allows", "out of memory",
    ]  # fmt: skip
    late = tuning.tune(configs, compiled, measured, time.monotonic() - 1)
    assert late.config == configs[0] and late.timed == 1, "the default is timed however late it is"


@pytest.mark.parametrize("written", [0, 1])
def test_a_launch_that_leaves_an_operation_out_is_refused(written, monkeypatch):
    """Though the right answer lies in its memory already."""
    operands = tuning.operands

    def answered(*given):
        made = operands(*given)
        for conv in made:
            twins.fused_conv(conv)
        return made

    def launch_of(convolutions, config):
        return lambda: [twins.fused_conv(conv) for conv in convolutions[:written]]

    monkeypatch.setattr(tuning, "operands", answered)
    monkeypatch.setattr(tuning, "launch_of", launch_of)
    shapes = tuple(geometry(kind, 5, 3, 20) for kind in ("identity", "plain"))
    config = LevelConfig((Tile(16, 16, 16),) * 2, 4, 4)
    with pytest.raises(tuning.RefusedError, match="wrong by"):
        tuning.measure(tuning.Level(shapes, 1, HALF), config, torch.device("cpu"))


def test_a_network_that_fits_the_cache_is_tuned_in_it():
    program = shapes_of("parnet_s")
    bytes_of_s = tuning.footprint(program, 1, HALF)
    assert 1 < bytes_of_s / (2 * program.parameters) < 1.3
    for cache, cold in ((bytes_of_s, False), (bytes_of_s - 1, True)):
        assert {level.cold for level in tuning.levels_of(program, 1, HALF, cache)} == {cold}


def test_the_gpu_says_what_a_loaded_kernel_spills():
    def launch_of(spilled):
        compiled = SimpleNamespace(_init_handles=lambda: None, n_spills=spilled)
        return SimpleNamespace(compile=lambda: compiled)

    tuning.load(launch_of(24))
    with pytest.raises(tuning.RefusedError, match="spills 100 bytes"):
        tuning.load(launch_of(25))


@pytest.mark.parametrize(("tile", "complaint"), [(Tile(64, 64, 64), None), (Tile(128, 128, 128), "shared memory")])
def test_a_configuration_is_compiled_before_it_is_timed(tile, complaint):
    level = tuning.Level((Geometry(14, 14, 256, 256, gate="identity"),), 1, HALF)
    found = tuning.complaints(level, LevelConfig((tile,), 8, 4), Target((9, 0), launchers=False))
    assert found == [] if complaint is None else any(complaint in line for line in found)


def test_a_table_is_written_as_it_is_read(tmp_path, monkeypatch):
    trial = tuning.Trial(LevelConfig((Tile(split_k=2), Tile(), Tile()), 8, 3), {"p50": 2.0}, {"p50": 3.0}, 2, ["x"])
    path = tmp_path / config.tuned_name("Some GPU (80/GB)=x")
    assert path.name == "tuned.Some_GPU_80_GB_x.json"
    path.write_text(json.dumps({"levels": {LEVEL.key: trial.entry(LEVEL, H200)}}))
    table = replace(Table.load((9, 0)), levels=config.read_levels(path))
    assert table.level(XL_LEVEL_5, 1, HALF) == trial.config
    path.write_text("{")
    with pytest.raises(ParNetError, match="not a table"):
        config.read_levels(path)
    assert config.read_levels(Path("nowhere.json")) == {}


def test_dry_run_lists_candidates():
    done = launch("tune.py", "--dry-run", "--model", "parnet_fashion", "--dtype", "bf16", "--show", 2)
    assert done.stdout.count("worth timing") == 10 and "no measurement" in done.stdout
