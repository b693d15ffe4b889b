"""What is installed, and what is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from conftest import ROOT
from parallel_parnet.commands import COMMANDS, start
from parallel_parnet.commands.bench import command as bench
from parallel_parnet.commands.bench.statistics import median_interval
from parallel_parnet.kernels.cpu.instruction_sets import HERE, MACHINE, SETS, sources
from parallel_parnet.kernels.cpu.objects import runnable
from small import OPTIONAL

PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
CPU = "parallel_parnet/kernels/cpu"
KERNELS = {f"{CPU}/{path.name}" for path in HERE.glob("*.[ch]")}
OBJECTS = {f"{CPU}/native_{each.name}.so" for each in SETS.get(MACHINE, ())}


def run(*command: object, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stand_in(folder: Path, what: str) -> str:
    """A compiler that does no more than this, in which "$2" is the object that it is to make."""
    path = folder / "cc"
    path.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; {what}\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone, as tests side by side must not build in one place."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("kernels", "launch", "parallel_parnet", "profiling", "results"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    return tree


@pytest.fixture(scope="module")
def installed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fresh environment in which the wheel is installed, with torch and others as they are here. A
    stand-in for the compiler gives the objects that `make setup` had from a real one, which takes a minute or two."""
    tmp_path = tmp_path_factory.mktemp("installed")
    compiler = stand_in(tmp_path, f'cp "{HERE}/$(basename "$2")" "$2"')
    pip = (sys.executable, "-m", "pip")
    wheel = (*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, tree)
    run(*wheel, cwd=tmp_path, environment={**os.environ, "CC": compiler})
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-{re.sub('[^a-z0-9]', '_', sysconfig.get_platform())}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"parallel_parnet", f"{wheel.name.split('-py')[0]}.dist-info"}
    assert {"parallel_parnet/profiling/spans.py", *KERNELS} <= set(names)
    assert "native" not in OPTIONAL or set(names) >= OBJECTS
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    assert "\nLicense-Expression: BSD-3-Clause\n" in zipfile.ZipFile(wheel).read(metadata).decode()
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "bin" / "parnet").rename(python.with_name("parnet"))  # where pip puts it without --target
    return tmp_path / "env"


def test_a_wheel_in_a_fresh_environment(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, parallel_parnet, parallel_parnet.profiling.spans;"
        "print(parallel_parnet.__file__, *(u.find_spec(name) for name in ('kernels', 'profiling', 'demo', 'launch')))"
    )
    where, *others = run(installed / "bin" / "python", "-c", code, cwd=tmp_path).split()
    assert Path(where).is_relative_to(installed)
    assert others[0] == "None" and others[2:] == ["None", "None"]
    assert others[1] == "None" or sys.version_info >= (3, 15)


def demo(python: Path, *words: object, cwd: Path, environment: Mapping[str, str] | None = None) -> dict:
    """What an install answers of the demo's pictures in an empty folder."""
    options = ("--json", "a.json", "--iterations", 3, "--verify")
    said = run(python, *words, *options, cwd=cwd, environment=environment)
    assert "equal up to rounding" in said and "Ankle boot 97.1%" in said
    result = json.loads((cwd / "a.json").read_text())
    for row in result["predictions"]:
        assert Path(row["image"]).name.split("-")[0] == str(row["top5"][0]["index"])
    return result


def test_the_demo_by_torchrun(installed: Path, tmp_path: Path) -> None:
    words = ("-m", "torch.distributed.run", "-m", "parallel_parnet", "infer", "--streams-per-gpu", 1)
    demo(installed / "bin" / "python", *words, cwd=tmp_path)


def test_the_demo_needs_no_compiler_home_or_cache(installed: Path, tmp_path: Path) -> None:
    """And runs by our kernels."""
    nothing, folder = {"PATH": str(tmp_path), "XDG_CACHE_HOME": "/proc"}, installed / "bin"
    result = demo(folder / "python", folder / "parnet", "infer", cwd=tmp_path, environment=nothing)
    assert "native" not in OPTIONAL or (result["executor"], result["isa"]) == ("native", runnable()[0])


def test_without_a_compiler(tree: Path, tmp_path: Path) -> None:
    """It installs, says what lacks, and takes no object of an earlier build along; a stand-in makes what it has."""
    made_up = stand_in(tmp_path, 'echo an object >"$2"')
    build = (sys.executable, "setup.py", "build", "--build-lib", "built")
    said = {}
    for compiler in (made_up, "false"):
        done = subprocess.run(
            build, cwd=tree, env={**os.environ, "CC": compiler}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        made = {path.relative_to(tree / "built").as_posix() for path in (tree / "built").rglob("*.so")}
        said[compiler] = done.stderr.count("CPU kernels were NOT compiled"), made
    assert said["false"] == (bool(OBJECTS), set())
    assert said[made_up] == (0, OBJECTS)


@pytest.mark.skipif(not OBJECTS, reason="the CPU kernels are for other machines")
@pytest.mark.parametrize("always", [False, True])
def test_a_compiler_that_is_killed(always: bool, tree: Path, tmp_path: Path) -> None:
    """As in a container of little memory: tried again alone, and then no install with a few objects of all."""
    once = "" if always else f'mkdir "{tmp_path}/$(basename "$2")" 2>/dev/null && '
    compiler = stand_in(tmp_path, f'{once}kill -9 $$; echo an object >"$2"')
    done = subprocess.run(
        (sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "built"),
        cwd=tree, env={**os.environ, "CC": compiler}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    made = {path.relative_to(tmp_path / "built").as_posix() for path in (tmp_path / "built").rglob("*.so")}
    if always:
        assert done.returncode == 1 and not made
        assert re.search(r"^error: the compiler was killed at .*: give it a GB of memory\Z", done.stderr.strip(), re.M)
    else:
        assert (done.returncode, made) == (0, OBJECTS) and "NOT compiled" not in done.stderr


def test_a_module_that_is_gone_is_in_no_wheel(tree: Path, tmp_path: Path) -> None:
    (gone := tmp_path / "parallel_parnet" / "gone.py").parent.mkdir()
    gone.touch()
    run(sys.executable, "setup.py", "build_py", "--build-lib", tmp_path, cwd=tree)
    assert not gone.exists() and gone.with_name("engine.py").exists()
    run(sys.executable, "setup.py", "build_py", "--build-lib", ".", cwd=tree)
    assert (tree / "parallel_parnet" / "engine.py").exists(), "of what is built where it lies nothing is removed"


@pytest.mark.skipif(not OBJECTS, reason="the CPU kernels are for other machines")
def test_a_wheel_for_another_machine_is_refused(tree: Path) -> None:
    done = subprocess.run(
        (sys.executable, "setup.py", "bdist_wheel"), cwd=tree, capture_output=True, text=True, timeout=240,
        env={**os.environ, "_PYTHON_HOST_PLATFORM": "linux-riscv64", "CC": "false"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith(f"error: a wheel for linux_riscv64 cannot be made on {MACHINE}: make it there\n")


def test_a_build_without_setuptools(tree: Path) -> None:
    done = subprocess.run([sys.executable, "-S", "setup.py", "build_ext"], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(r"error: setuptools>=77 is needed: .*\n", done.stderr)


@pytest.mark.skipif(not OBJECTS, reason="the CPU kernels are for other machines")
def test_an_object_of_these_sources_is_not_compiled_again(tree: Path, tmp_path: Path) -> None:
    """One of other sources is."""
    stand_in(tmp_path, 'echo an object >"$2"')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment["CC"] = ""  # as good as none
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    run(*build, cwd=tree, environment=environment)
    stale, *others = (tree / "kernels" / "cpu").glob("*.so")
    assert len(others) == len(OBJECTS) - 1
    for path in others:
        path.write_text(f"made of {sources()}")
    stale.write_text("made of others")
    run(*build, cwd=tree, environment=environment)
    assert stale.read_text() == "an object\n"
    assert {path.read_text() for path in others} == {f"made of {sources()}"}
    for path in (stale, *others):
        path.unlink()


def test_what_a_source_distribution_carries(tree: Path, tmp_path: Path) -> None:
    run(sys.executable, "setup.py", "sdist", "--dist-dir", tmp_path, cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert KERNELS | {f"{CPU}/instruction_sets.py", "setup.py"} <= names
    assert not [name for name in names if name.endswith(".so")]


EACH = """
import runpy, sys
for sys.argv in {}:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print(end.code)
    print("---", flush=True)
    print("---", file=sys.stderr)
"""


def test_the_other_commands_of_an_install(installed: Path, tmp_path: Path) -> None:
    """One after the other in a process, which takes seconds to start."""
    commands = [
        ("--help",),
        ("plan", "--gpus", "2", "--link", "loopback", "--exactly"),
        ("latency-vs-depth", "--only", "nothing", "--out", str(tmp_path)),  # refused once the link is read
        ("infre",),
    ]
    code = EACH.format([[str(installed / "bin" / "parnet"), *words] for words in commands])
    words = (installed / "bin" / "python", "-c", code)
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    usage, plan, _, *statuses = done.stdout.split("---\n")
    assert all(f"  {name} " in usage for name in COMMANDS)
    assert "lanes over loopback" in plan
    assert statuses == ["2\n", ""]
    *none, refused, wrong, rest = done.stderr.split("---\n")
    assert not any(none) and not rest and "error: --only nothing: choose part of one of" in refused
    assert wrong.startswith("error: parnet infre: no such command; choose one of infer,") and wrong.count("\n") == 1


@pytest.mark.parametrize("absent", ["parallel_parnet.commands.bench.command", "scipy.stats"])
def test_an_extra_that_is_not_installed(
    absent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it is imported late."""
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.setattr(bench, "main", lambda: len(median_interval([1.0] * 9)))
    with pytest.raises(SystemExit, match="2"):
        start("bench")
    assert re.fullmatch(
        rf"error: bench needs {absent}: pip install 'parallel_parnet\[bench\]'\n", capsys.readouterr().err
    )


def test_a_clone_whose_packages_are_missing_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", ROOT / "launch" / "plan.py", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and re.fullmatch(r"error: \S+ lacks torch: .*activate\n", done.stderr), done.stderr


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_one_pin_for_each_python(version: str) -> None:
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    apply = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(environment)]
    assert sorted(pin.name for pin in apply) == sorted({pin.name for pin in PINS})
    assert all(str(pin.specifier).startswith("==") for pin in apply)


def test_pins_fit_each_other() -> None:
    """What a package that is installed as it is pinned demands of others; CUDA builds of torch demand one triton."""
    here = {pin.name: pin for pin in PINS if pin.marker is None or pin.marker.evaluate()}
    pinned = [name for name, pin in here.items() if pin.specifier.contains(version(name))]
    demands = [(name, Requirement(line)) for name in pinned for line in requires(name) or []]
    held = [
        (name, demand, pin)
        for name, demand in demands
        if demand.name in here and (demand.marker is None or demand.marker.evaluate({"extra": ""}))
        for pin in [next(iter(here[demand.name].specifier)).version]
    ]
    assert held or not pinned, "onnx and others demand a numpy"
    assert not [row for row in held if not row[1].specifier.contains(row[2])]


def make(*words: object) -> str:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # not by `make test`
    return run("make", *words, cwd=ROOT, environment=alone)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
def test_plain_make_installs_nothing_and_tells_what_there_is() -> None:
    assert "pip" not in make("--dry-run")
    assert make().startswith("make infer ")


@needs_make
@pytest.mark.parametrize("made", [True, False])
def test_a_gpu_is_checked_by_the_python_that_was_set_up(made: bool, tmp_path: Path) -> None:
    """The machine's own where `make setup` has not been run."""
    python = tmp_path / "bin" / "python"
    if made:
        python.parent.mkdir()
        python.touch()
    line = make("--dry-run", "gpu-check", f"VENV={tmp_path}", "PYTHON=own")
    assert line.startswith(f"{python if made else 'own'} launch/gpu_check.py")
