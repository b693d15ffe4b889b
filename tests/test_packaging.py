"""What is installed, and what is not."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from conftest import ROOT

PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_in_a_fresh_environment(tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"parallel_parnet", f"{wheel.name.split('-py')[0]}.dist-info"}
    assert {"parallel_parnet/profiling/spans.py", "parallel_parnet/kernels/native.c"} <= set(names)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and others, as they are here
    code = (
        "import importlib.util as u, parallel_parnet, parallel_parnet.profiling.spans;"
        "print(parallel_parnet.__file__, u.find_spec('kernels'), u.find_spec('profiling'))"
    )
    where, kernels, profiling = run(python, "-c", code, cwd=tmp_path).split()
    assert Path(where).is_relative_to(site)
    assert kernels == "None"
    assert profiling == "None" or sys.version_info >= (3, 15)


def test_no_install_is_needed(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from parallel_parnet.profiling import spans; print(spans)"
    assert str(ROOT) in run(sys.executable, "-c", code, cwd=tmp_path)


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_one_pin_for_each_python(version: str) -> None:
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    apply = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(environment)]
    assert sorted(pin.name for pin in apply) == sorted({pin.name for pin in PINS})
    assert all(str(pin.specifier).startswith("==") for pin in apply)


def test_pins_fit_each_other() -> None:
    """What an installed package demands of another that is pinned; CUDA builds of torch demand one triton."""
    here = {pin.name: pin for pin in PINS if pin.marker is None or pin.marker.evaluate()}
    demands = [(name, Requirement(line)) for name in here for line in requires(name) or []]
    held = [
        (name, demand, version)
        for name, demand in demands
        if demand.name in here and (demand.marker is None or demand.marker.evaluate({"extra": ""}))
        for version in [next(iter(here[demand.name].specifier)).version]
    ]
    assert held, "onnx and others demand a numpy"
    assert not [row for row in held if not row[1].specifier.contains(row[2])]
