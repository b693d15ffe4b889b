"""launch/profile.py: command lines for Nsight, its exports, words and pages from traces, and its errors."""

from __future__ import annotations

import gzip
import json
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from signal import SIGPIPE

import pytest

from conftest import ROOT, TracedRun, launch
from parallel_parnet import ParNetError
from parallel_parnet.profiling import advice, nsight, report, trace_format
from parallel_parnet.profiling.ranges import CAPTURED, DOMAIN
from parallel_parnet.profiling.timeline import REAL, Bar

THREE = ["torchrun", "--nproc-per-node", "3", "launch/infer.py", "--batch-size", "2"]


def test_nsys_with_one_process_and_with_ranks() -> None:
    alone = nsight.nsys_command(["python", "launch/infer.py"], Path("out"))
    assert alone == [
        "nsys", "profile", "--trace=cuda,nvtx", "--cuda-graph-trace=node", "--sample=none", "--cpuctxsw=none",
        "--capture-range=nvtx", "--nvtx-capture=traced@parallel_parnet", "--capture-range-end=stop",
        "--force-overwrite=true", "--output=out/rank0", "python", "launch/infer.py", "--trace", "out/trace.json.gz",
    ]  # fmt: skip
    ranks = nsight.nsys_command(THREE, Path("out"), "cudaProfilerApi")
    assert ranks[:5] == ["torchrun", "--nproc-per-node", "3", "--no-python", "nsys"]
    assert "--capture-range=cudaProfilerApi" in ranks
    assert ranks[-7:] == [
        "--output=out/rank%q{RANK}", "python", "launch/infer.py", "--batch-size", "2", "--trace", "out/trace.json.gz",
    ]  # fmt: skip
    assert not any(word.startswith("--capture-range") for word in nsight.nsys_command(THREE, Path("out"), "none"))


def test_the_python_of_a_torchrun_elsewhere() -> None:
    assert "/env/bin/python" in nsight.nsys_command(["/env/bin/torchrun", "launch/infer.py"], Path("out"))
    module = ["/env/bin/python3", "-m", "torch.distributed.run", "launch/infer.py"]
    assert nsight.nsys_command(module, Path("out")).count("/env/bin/python3") == 2


def test_the_commands_of_an_install() -> None:
    ranks = ["torchrun", "--nproc-per-node", "2", "-m", "parallel_parnet", "infer"]
    line = nsight.nsys_command(ranks, Path("out"))
    assert line[:5] == [*ranks[:3], "--no-python", "nsys"]
    assert line[-6:] == ["python", *ranks[3:], "--trace", "out/trace.json.gz"]
    module = ["python3", "-m", "torch.distributed.run", "-m", "parallel_parnet", "infer"]
    assert nsight.split_launch(module) == (module[:3], ["python3", *module[3:]])
    alone = ["python3", "-m", "parallel_parnet", "infer", "--labels", "mine.py"]
    assert nsight.split_launch(alone) == ([], alone)
    assert nsight.split_launch(["parnet", "infer"]) == ([], ["parnet", "infer"])


@pytest.mark.parametrize(
    ("launch", "says"),
    [
        ([*THREE, "--trace", "mine.json"], "leave --trace out"),
        ([*THREE, "--trace=mine.json"], "leave --trace out"),
        (["python", "launch/validate.py", "data/bench"], "validate has no --trace.*--capture none"),
        (["parnet", "validate", "bench"], "validate has no --trace"),
        (["parnet"], "parnet has no --trace"),
        (["torchrun", "--no-python", "python", "launch/infer.py"], "leave --no-python and python out"),
    ],
)
def test_what_nsys_cannot_take(launch: list[str], says: str) -> None:
    with pytest.raises(ParNetError, match=says):
        nsight.nsys_command(launch, Path("out"))


@pytest.mark.parametrize("words", ["parnet plan", "python mine.py --trace x", "python -m parallel_parnet train"])
def test_all_of_any_command(words: str) -> None:
    line = nsight.nsys_command(words.split(), Path("out"), "none")
    assert line[-len(words.split()) :] == words.split() and "--trace=cuda,nvtx" in line


@pytest.mark.parametrize("options", [[], ["-u"], ["-X", "a", "-X", "b"]])
@pytest.mark.parametrize("called", [["launch/infer.py"], ["launch/bench.py", "x"], ["-m", "parallel_parnet", "infer"]])
def test_options_of_python(options: list[str], called: list[str]) -> None:
    line = nsight.nsys_command(["python", *options, *called], Path("out"))
    assert line[-2:] == ["--trace", "out/trace.json.gz"]


def test_ncu_on_one_kernel() -> None:
    line = nsight.ncu_command(THREE, Path("out"), "level.*", skip=7, count=2, lock_clocks=False)
    assert line[:5] == [*THREE[:3], "--no-python", "ncu"]
    wanted = {
        "--kernel-name=regex:level.*", "--launch-skip=7", "--launch-count=2", "--clock-control=none",
        "--graph-profiling=node", "--export=out/rank%q{RANK}",
    }  # fmt: skip
    assert wanted <= set(line)
    assert not any("--clock-control" in word for word in nsight.ncu_command(THREE, Path("out"), "level"))


@pytest.mark.ranks
def test_every_rank_ran_under_its_own_nsys(traced_run: TracedRun) -> None:
    for line in traced_run.nsys:
        assert line[1] == "profile"
        assert f"--output={traced_run.folder}/rank%q{{RANK}}" in line
        assert line[line.index(sys.executable) + 1] == str(ROOT / "launch" / "infer.py")


def exported(bars: Iterable[Bar], ahead: float) -> list[tuple[str, int, int]]:
    """A lane's real path as ranges in nanoseconds of a session that began `ahead` seconds before the trace."""
    found = [(b.name, round((b.start + ahead) * 1e9), round((b.end + ahead) * 1e9)) for b in bars if b.row == REAL]
    return sorted(found, key=lambda r: r[1])


def write_database(file: Path, epoch: int, ranges: list[tuple[str, int, int]], kernels: list[tuple]) -> None:
    """What nsys export --type sqlite writes, as far as its schema's reference names what is read here."""
    with closing(sqlite3.connect(file)) as db:
        db.execute("CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INT)")
        db.execute("CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT)")
        db.execute("CREATE TABLE NVTX_EVENTS (start INT, end INT, eventType INT, text TEXT, textId INT, domainId INT)")
        db.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT, end INT, streamId INT, demangledName INT)")
        db.execute("INSERT INTO TARGET_INFO_SESSION_START_TIME VALUES (?)", (epoch,))
        db.execute("INSERT INTO NVTX_EVENTS VALUES (0, NULL, 75, ?, NULL, 3)", (DOMAIN,))
        db.execute("INSERT INTO NVTX_EVENTS VALUES (1, 9, 59, 'somebody else', NULL, 0)")
        names = {name: i for i, name in enumerate({r[0] for r in (*ranges, *kernels)})}
        db.executemany("INSERT INTO StringIds VALUES (?, ?)", [(i, name) for name, i in names.items()])
        rows = [(start, end, 59, names[name]) for name, start, end in ranges]
        db.executemany("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, NULL, ?, 3)", rows)
        rows = [(start, end, stream, names[name]) for name, start, end, stream in kernels]
        db.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?)", rows)
        db.commit()


@pytest.mark.ranks
def test_exports_give_the_timeline_back(traced_run: TracedRun, tmp_path: Path) -> None:
    """The real run's ranges, put into Nsight's layout with made-up sessions and kernels, are read as they were."""
    timeline = trace_format.read(traced_run.trace)
    for lane in range(3):
        own, ahead = [bar for bar in timeline.bars if bar.lane == lane], random.uniform(1, 9)
        ranges = exported(own, ahead)
        kernels = [(f"kernel_{i}", start, (start + end) // 2, 7) for i, (_, start, end) in enumerate(ranges[-3:])]
        ranges.insert(0, (CAPTURED, ranges[0][1] - 5, max(end for _, _, end in ranges) + 5))
        write_database(tmp_path / f"rank{lane}.sqlite", 10**18 + round(-ahead * 1e9), ranges, kernels)
    merged = nsight.merge(timeline, tmp_path)
    kernels_found = [bar for bar in merged.bars if bar.kind == "kernel"]
    assert {bar.row for bar in kernels_found} == {"CUDA stream 7"}
    assert len(kernels_found) == 9
    assert placed(merged.bars) == pytest.approx(placed(timeline.bars), abs=3e-6)
    assert len(merged.arrows) == len(timeline.arrows)
    assert advice.explain(merged)


def placed(bars: Iterable[Bar]) -> dict[tuple, float]:
    """Both ends of every bar but kernels."""
    return {
        (b.lane, b.row, b.number, b.name, end): getattr(b, end)
        for b in bars
        for end in ("start", "end")
        if b.kind != "kernel"
    }


@pytest.mark.ranks
def test_exports_of_another_program(traced_run: TracedRun, tmp_path: Path) -> None:
    timeline = trace_format.read(traced_run.trace)
    for lane in range(3):
        ranges = exported([bar for bar in timeline.bars if bar.lane == lane], 1.0)
        spoiled = [(name.replace("stream 2", "stream 7"), start, end) for name, start, end in ranges]
        write_database(tmp_path / f"rank{lane}.sqlite", 10**18, spoiled, [])
    with pytest.raises(ParNetError, match=r"lane 2 has a range 'stem, stream 7'.*differing programs"):
        nsight.merge(timeline, tmp_path)
    (tmp_path / "rank1.sqlite").unlink()
    with pytest.raises(ParNetError, match="no such export; nsys export --type=sqlite"):
        nsight.merge(timeline, tmp_path)


@pytest.mark.ranks
def test_bad_traces(traced_run: TracedRun, tmp_path: Path) -> None:
    data = traced_run.trace.read_bytes()
    content = json.loads(gzip.decompress(data))
    cases = {"cut.json.gz": data[: len(data) // 2], "cut.json": gzip.decompress(data)[:-100], "other.json": b"[]"}
    cases |= {"list.json": b'{"otherData": []}', "deep.json": b"[" * 100_000}
    of_before = {key: value for key, value in content["otherData"].items() if key != "predicted"}
    cases["of_before.json"] = json.dumps({**content, "otherData": of_before}).encode()
    next(e for e in content["traceEvents"] if e["name"] == "streams.2.1")["name"] = "streams.9.9"
    cases["differs.json"] = json.dumps(content).encode()
    del next(e for e in content["traceEvents"] if e["ph"] == "X")["ts"]
    cases["damaged.json"] = json.dumps(content).replace("streams.9.9", "streams.2.1").encode()
    messages = {}
    for name, spoiled in cases.items():
        (tmp_path / name).write_bytes(spoiled)
        with pytest.raises(ParNetError) as error:
            trace_format.read(tmp_path / name)
        messages[name] = str(error.value)
        assert "\n" not in messages[name]
        assert name in messages[name] or "lane" in messages[name]
    assert "not a whole trace" in messages["cut.json.gz"]
    assert "not a whole trace" in messages["cut.json"]
    assert "not a trace of this project" in messages["other.json"]
    assert "ranks with differing programs" in messages["differs.json"]
    assert "not a trace of this project" in messages["list.json"]
    assert "not a whole trace" in messages["deep.json"]
    assert "damaged" in messages["damaged.json"]
    assert "'predicted'" in messages["of_before.json"]


def test_a_reader_that_has_enough() -> None:
    example = ROOT / "results" / "trace-parnet_s-3-ranks.json.gz"
    line = [sys.executable, ROOT / "launch" / "profile.py", "explain", example]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""
        assert run.wait(60) == 128 + SIGPIPE


@pytest.mark.ranks
def test_the_script_explains_and_draws(traced_run: TracedRun, tmp_path: Path) -> None:
    run = launch("profile.py", "explain", traced_run.trace)
    assert run.stdout.strip() == advice.explain(trace_format.read(traced_run.trace))
    absent = tmp_path / "absent" / "page.html"
    with pytest.raises(ParNetError, match="cannot be written"):
        report.write(trace_format.read(traced_run.trace), absent)


def one_error(run: subprocess.CompletedProcess) -> str:
    assert run.returncode == 2, run.stdout
    (line,) = run.stderr.strip().splitlines()
    return line


def test_without_nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Callable) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    line = one_error(here("profile", "nsys", "--", *THREE))
    assert "nsys is not on the PATH" in line and "by --trace trace.json" in line


def test_what_is_at_fault_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Callable) -> None:
    trace = tmp_path / "trace.json.gz"
    trace.write_bytes((ROOT / "results" / "trace-parnet_s-3-ranks.json.gz").read_bytes())
    (tmp_path / "rank0.nsys-rep").touch()
    nsys = tmp_path / "nsys"
    nsys.write_text("#!/bin/sh\nexit 3\n")
    nsys.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for arguments, said in (
        (("report", trace, "--report", trace), "give a name that ends in .html"),
        (("import", tmp_path, "--trace", "merged.txt"), "give a name that ends in .json or .json.gz"),
        (("import", tmp_path, "--trace", tmp_path / "merged.json"), "ended with exit status 3"),
        (("nsys", "--output", trace, "--", *THREE), "no folder, and none can be made"),
        (("explain", trace, "--", *THREE), "starts nothing"),
    ):
        assert said in one_error(here("profile", *arguments))
    assert trace_format.read(trace).bars, "what was read is not overwritten"
    database, recorded = tmp_path / "rank0.sqlite", (tmp_path / "rank0.nsys-rep").stat().st_mtime
    database.touch()
    for later, said in ((-9, "ended with exit status 3"), (9, "not a whole export of nsys")):
        os.utime(database, (recorded + later, recorded + later))  # of the run before, and of this one
        assert said in one_error(here("profile", "import", tmp_path, "--trace", tmp_path / "merged.json"))


def test_a_database_in_a_folder_with_signs_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "50%20 of #1?"
    folder.mkdir()
    write_database(folder / "rank0.sqlite", 10**18, [("request", 1, 2)], [])
    assert [span.name for span in nsight.read_rank(folder, 0)[0]] == ["request"]


def test_a_database_without_ranges(tmp_path: Path) -> None:
    """Of a run that was not told to trace, say."""
    write_database(tmp_path / "rank0.sqlite", 10**18, [], [])
    timeline = trace_format.read(ROOT / "results" / "trace-parnet_s-3-ranks.json.gz")
    with pytest.raises(ParNetError, match=r"rank 0 has no range 'request'.*was anything captured\?"):
        nsight.merge(replace(timeline, known=replace(timeline.known, lanes=1)), tmp_path)


def test_the_standard_librarys_profile_stays_what_it_is() -> None:
    """torch imports cProfile, which imports `profile`: not launch/profile.py, for any script and what it starts."""
    code = (
        f"import sys, runpy; sys.path[0] = {str(ROOT / 'launch')!r};"
        f"runpy.run_path({str(ROOT / 'launch' / 'profile.py')!r}); import cProfile, profile; print(profile.__file__);"
        "import subprocess, os; os.environ['PYTHONPATH'] = os.pathsep.join(sys.path);"
        "subprocess.run([sys.executable, '-c', 'import cProfile, profile; print(profile.__file__)'], check=True)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert len(run.stdout.splitlines()) == 2
    assert str(ROOT) not in run.stdout


def test_what_a_script_spawns_finds_what_the_script_imports() -> None:
    """A spawned process runs its script anew, by the path to modules of the one that spawned it."""
    code = (
        f"import sys, runpy, multiprocessing; script = {str(ROOT / 'launch' / 'tune.py')!r};"
        f"sys.path[0] = {str(ROOT / 'launch')!r}; runpy.run_path(script); sys.modules['__main__'].__file__ = script;"
        "child = multiprocessing.get_context('spawn').Process(target=print, args=('started',)); child.start();"
        "child.join(); sys.exit(child.exitcode)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, "started\n"), run.stderr
