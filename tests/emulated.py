"""Run a level's kernel on a CPU: level.cu compiled as C++ with emulator.h in place of a Hopper."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from parallel_parnet.kernels.gpu.convolution import Convolution
from parallel_parnet.kernels.hopper.source import FOLDER, POINTERS, clusters, constants, numbers, source

EMULATOR = Path(__file__).parent / "kernels" / "hopper" / "emulator.h"
RUN = """
extern "C" void run(const Arguments* arguments, int blocks, int bytes) {
    for (int first = 0; first < blocks; first += CLUSTER) {
        CLUSTER_OF_BLOCKS.clear();
        for (int i = 0; i < CLUSTER; i++)
            CLUSTER_OF_BLOCKS.push_back(std::make_unique<Block>(THREADS, CONSUMERS, GATERS, bytes));
        WHOLE_CLUSTER = std::make_unique<std::barrier<>>(CLUSTER * THREADS);
        std::vector<std::thread> threads;
        for (int i = 0; i < CLUSTER * THREADS; i++)
            threads.emplace_back([=] {
                BLOCK = CLUSTER_OF_BLOCKS[i / THREADS].get(), THREAD = i % THREADS;
                dispatch<0>(*arguments, first + i / THREADS, BLOCK->shared());
            });
        for (std::thread& each : threads) each.join();
    }
}
"""


def level(convolutions: Sequence[Convolution], folder: Path, edit: Callable[[str], str] = lambda text: text) -> None:
    """Run them as one launch. edit: of level.cu's text, to plant a bug."""
    made, whole = numbers(convolutions), source(convolutions)
    bm = convolutions[0].tile.bm
    text = "\n".join(
        [
            "#define __device__",
            constants(made, clusters(convolutions), bm, whole.room, convolutions[0].dtype),
            EMULATOR.read_text(),
            edit((FOLDER / "level.cu").read_text()) + RUN,
        ]
    )
    name = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not name.with_suffix(".so").exists():
        name.with_suffix(".cpp").write_text(text)
        command = ["g++", "-std=c++20", "-O1", "-fno-strict-aliasing", "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([*command, "-o", name.with_suffix(".so"), name.with_suffix(".cpp")], check=True)
    pointers = [0 if (t := getattr(conv.x, p)) is None else t.data_ptr() for conv in convolutions for p in POINTERS]
    arguments = (ctypes.c_uint64 * len(pointers))(*pointers)
    ctypes.CDLL(name.with_suffix(".so")).run(arguments, whole.blocks, whole.shared)
