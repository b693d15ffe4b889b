"""Run a level's kernel on a CPU: level.cu compiled as C++ with emulator.h in place of a Hopper."""

from __future__ import annotations

import ctypes
import hashlib
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from parallel_parnet.kernels.gpu.convolution import Convolution
from parallel_parnet.kernels.hopper.source import AHEAD, FOLDER, arguments, clusters, constants, numbers, source

EMULATOR = Path(__file__).parent / "kernels" / "hopper" / "emulator.h"
READ = ("a", "b", "a_sums", "b_sums")  # which the launch before this one writes
RUN = """
extern "C" int fetched(Written* to, int most) {
    int n = FETCHED.size() < most ? FETCHED.size() : most;
    memcpy(to, FETCHED.data(), n * sizeof(Written));
    return FETCHED.size();
}
extern "C" int run(const Arguments* arguments, int blocks, int bytes, const Written* written, int n, u64 seed) {
    static_assert(COUNTED == THREADS);
    DRAWN = seed;
    FETCHED.clear();
    WRITTEN_BEFORE.assign(written, written + n);
    bool ended = true;
    for (int first = 0; ended && first < blocks; first += CLUSTER) ended = run_cluster(arguments, first, bytes);
    return ended;
}
"""


class WaitedInVainError(Exception):
    """Threads wait for each other, or for what nobody sends."""


def level(
    convolutions: Sequence[Convolution],
    folder: Path,
    edit: Callable[[str], str] = lambda text: text,
    ahead: Sequence[Tensor] = (),
) -> list[tuple[int, int]]:
    """Run them as one launch; the addresses and bytes that it sent for ahead. edit: of level.cu's text, to plant a bug.
    WaitedInVainError where it comes to no end."""
    made, whole = numbers(convolutions), source(convolutions)
    text = "\n".join(
        [
            "#define __device__\n#define __constant__",
            constants(made, clusters(convolutions), convolutions[0].tile.bm, whole.room, convolutions[0].dtype),
            EMULATOR.read_text(),
            edit((FOLDER / "level.cu").read_text()) + RUN,
        ]
    )
    name = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not name.with_suffix(".so").exists():
        name.with_suffix(".cpp").write_text(text)
        # longjmp is fortified against leaving one stack for another, which is what a fiber does
        command = ["g++", "-std=c++20", "-Og", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-shared", "-fPIC", "-w"]
        # newer ones give constants of templates one address in a process, whichever library they are of
        command.append("-fno-gnu-unique")
        subprocess.run([*command, "-o", name.with_suffix(".so"), name.with_suffix(".cpp")], check=True)
    words = arguments(convolutions, ahead, whole.blocks)
    read = {id(t): t for conv in convolutions for p in READ if (t := getattr(conv.x, p)) is not None}.values()
    written = (ctypes.c_uint64 * (2 * len(read)))(*(n for t in read for n in (t.data_ptr(), t.nbytes)))
    seed = ctypes.c_uint64(random.randrange(1, 2**64))
    library = ctypes.CDLL(name.with_suffix(".so"))
    given = (ctypes.c_uint64 * len(words))(*words)
    if not library.run(given, whole.blocks, whole.shared, written, len(read), seed):
        raise WaitedInVainError
    fetched = (ctypes.c_uint64 * (2 * whole.blocks * AHEAD))()
    count = library.fetched(fetched, whole.blocks * AHEAD)
    return list(zip(fetched[: 2 * count : 2], fetched[1 : 2 * count : 2], strict=True))
