"""Packaging. kernels/, profiling/ and launch/demo/ are installed only inside the package, through the links in
parallel_parnet/: top-level packages of those names would collide with others' (see docs/architecture.md)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="parallel_parnet",
    version="0.1.0",
    description="ParNet with its streams really running in parallel",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["parallel_parnet", "parallel_parnet.*"]),
        "parallel_parnet.demo",
        "parallel_parnet.kernels.cpu",
        "parallel_parnet.kernels.gpu",
        "parallel_parnet.profiling",
    ],
    package_data={
        "parallel_parnet.commands.plan": ["*.json"],
        "parallel_parnet.commands.train": ["recipes/*.json"],
        "parallel_parnet.demo": ["*.json", "*.safetensors", "pictures/*.png"],
        "parallel_parnet.kernels.cpu": ["native.c"],
        "parallel_parnet.kernels.gpu": ["configs/*.json"],
        "parallel_parnet.profiling": ["report.html", "report.js"],
    },
    entry_points={"console_scripts": ["parnet = parallel_parnet.commands:main"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy",
        "nvidia-ml-py",
        "nvtx; sys_platform != 'darwin'",  # which has no wheel for it, and no NVIDIA GPU
        "pillow>=11",
        "rich",
        "safetensors",
    ],
    extras_require={
        "cpu": ["openvino>=2026.1"],
        "bench": ["matplotlib", "onnx", "onnxruntime", "onnxscript", "openvino>=2026.1", "scipy"],
        "export": ["onnx", "onnxruntime", "openvino>=2026.1"],
        "figures": ["matplotlib", "scipy"],
        "dev": [
            "hypothesis",
            "matplotlib",
            "mypy",
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
