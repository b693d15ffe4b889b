"""Packaging. kernels/, profiling/ and launch/demo/ are installed only inside the package, through the links in
parallel_parnet/: top-level packages of those names would collide with others' (see docs/architecture.md). The CPU
kernels are compiled here, by CC, else cc: an object for each instruction set, which knows nothing of Python."""

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from runpy import run_path

try:
    from setuptools import Extension, find_packages, setup
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_ext import build_ext
    from setuptools.command.build_py import build_py
    from setuptools.errors import CompileError, PlatformError
except ImportError:  # pip brings its own; `python setup.py` takes what there is, which may be nothing
    sys.exit(f"error: setuptools>=77 is needed: {sys.executable} -m pip install 'setuptools>=77'")

CPU = "parallel_parnet/kernels/cpu"
KERNELS = run_path(f"{CPU}/instruction_sets.py")  # not imported, as the package needs torch
OBJECTS = {f"{CPU.replace('/', '.')}.native_{each.name}": each for each in KERNELS["SETS"].get(KERNELS["MACHINE"], ())}
NONE = """
***
*** CPU kernels were NOT compiled: {}.
*** Executor native will be missing, or slower than this CPU is. It takes gcc 11 or later: install it, then this
*** again, by pip install --no-cache-dir --force-reinstall: pip keeps the wheel that it has made.
***
"""


class Modules(build_py):
    """A wheel's modules; what an earlier build left, of a module that is gone, is none of them."""

    def run(self) -> None:
        if Path(self.build_lib).resolve() != Path().resolve():
            shutil.rmtree(Path(self.build_lib, "parallel_parnet"), ignore_errors=True)
        super().run()


class CompileKernels(build_ext):
    """What cannot be compiled is left out, and said. A clone's objects of these sources stay, unless CC is given."""

    def run(self) -> None:
        self.killed: list[str] = []
        self.of_clone = self.inplace  # which setuptools hides while it builds elsewhere, to copy what was made
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext: Extension) -> None:
        to = Path(self.get_ext_fullpath(ext.name))
        to.parent.mkdir(parents=True, exist_ok=True)
        to.unlink(missing_ok=True)
        made = Path(self.get_ext_filename(ext.name))
        compiler = shlex.split(os.environ.get("CC", ""))  # which may be there and empty
        stays = self.of_clone and not compiler and made.exists()
        if stays and KERNELS["sources"]().encode() in made.read_bytes():
            shutil.copy(made, to)
            return
        command = KERNELS["command"](compiler or ["cc"], KERNELS["MACHINE"], OBJECTS[ext.name], to)
        self.announce(shlex.join(command), logging.INFO)
        try:
            done = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, stderr=subprocess.PIPE)
        except OSError as error:
            raise CompileError(f"{command[0]}: {error.strerror}") from None
        sys.stderr.write(done.stderr.decode(errors="replace"))
        if done.returncode:
            to.unlink(missing_ok=True)  # of which there may be a part
            # gcc and clang say so of what they start themselves
            if done.returncode == -signal.SIGKILL or b"Killed" in done.stderr:
                self.killed.append(OBJECTS[ext.name].name)
            raise CompileError(f"{command[0]} ended with {done.returncode}")

    def build_extensions(self) -> None:
        self.parallel = jobs()
        super().build_extensions()
        self.parallel, self.killed, every = None, [], self.extensions
        self.extensions = [ext for ext in every if not os.path.exists(self.get_ext_fullpath(ext.name))]
        super().build_extensions()  # what lacks, one by one: several compilers may have lacked memory together
        self.extensions = every
        if self.killed:  # else whoever builds with too little memory would have a slower engine for good
            raise CompileError(f"the compiler was killed at {', '.join(self.killed)}: give it a GB of memory")
        if lacking := [name for name in OBJECTS if not os.path.exists(self.get_ext_fullpath(name))]:
            sys.stderr.write(NONE.format(", ".join(OBJECTS[name].name for name in lacking)))


def jobs() -> int:
    """Compilers at a time: one for each core that may be used, and each GB of memory, of which it takes half."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # not there, or "max"
            memory = min(memory, int(Path(limit).read_text()))
    return max(1, min(cores, memory >> 30))


class PlatformWheel(bdist_wheel):
    """For any Python on this platform, which is the kernels' own."""

    def run(self) -> None:
        self.get_tag()  # which may refuse, before minutes of compiling
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        if OBJECTS and not platform.replace("arm64", "aarch64").endswith((KERNELS["MACHINE"], "universal2")):
            raise PlatformError(f"a wheel for {platform} cannot be made on {KERNELS['MACHINE']}: make it there")
        return "py3", "none", platform


setup(
    name="parallel_parnet",
    version="0.1.0",
    description="ParNet with its streams really running in parallel",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="BSD-3-Clause",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["parallel_parnet", "parallel_parnet.*"]),
        "parallel_parnet.demo",
        "parallel_parnet.kernels.cpu",
        "parallel_parnet.kernels.gpu",
        "parallel_parnet.kernels.hopper",
        "parallel_parnet.profiling",
    ],
    package_data={
        "parallel_parnet.commands.plan": ["*.json"],
        "parallel_parnet.commands.train": ["recipes/*.json"],
        "parallel_parnet.demo": ["*.json", "*.safetensors", "pictures/*.png"],
        "parallel_parnet.kernels.cpu": ["*.c", "*.h"],
        "parallel_parnet.kernels.gpu": ["configs/*.json"],
        "parallel_parnet.kernels.hopper": ["*.cu", "*.cuh"],
        "parallel_parnet.profiling": ["report.html", "report.js"],
    },
    ext_modules=[Extension(name, [f"{CPU}/native.c"], optional=True) for name in OBJECTS],
    cmdclass={"build_py": Modules, "build_ext": CompileKernels, "bdist_wheel": PlatformWheel},
    entry_points={"console_scripts": ["parnet = parallel_parnet.commands:main"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=1.26",
        "nvidia-ml-py>=12.535.108",  # before, some reasons for low clocks had no name
        "nvtx>=0.2.12; sys_platform != 'darwin'",  # which has no wheel for it, and no NVIDIA GPU
        "pillow>=12.1",  # before, hidden pixels of one bit, or of a palette with levels, were seen
        "rich>=14.3",  # before, a progress bar that is not shown left a line
        "safetensors>=0.4.5",
    ],
    extras_require={
        "cpu": ["openvino>=2026.1"],
        "bench": ["matplotlib", "onnx", "onnxruntime", "onnxscript", "openvino>=2026.1", "scipy"],
        "export": ["onnx", "onnxruntime", "openvino>=2026.1"],
        "figures": ["matplotlib", "scipy"],
        "dev": [
            "cuda-bindings; sys_platform == 'linux'",  # which torch's builds for CUDA bring along, as NVRTC
            "hypothesis",
            "matplotlib",
            "mypy",
            "nvidia-cuda-nvrtc; sys_platform == 'linux'",
            "pre-commit",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "scipy",
            "setuptools>=77",
        ],
    },
)
