"""Every level of every variant compiled for GPUs that are not here, and held to what a fast kernel must look like.

pytest tests/kernels                      S and XL for Hopper in fp16, and a sixth as many others, drawn at random
KERNEL_TESTS=all pytest tests/kernels     everything
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from operator import itemgetter

import pytest
import torch

from cases import ALL, drawn
from parallel_parnet.commands.gpu.level_tuning import levels_of, operands
from parallel_parnet.commands.gpu.precompile import Target, shapes_in_fp8, shapes_of
from parallel_parnet.commands.gpu.probes import compile_probes
from parallel_parnet.executors.triton_backend import whole
from parallel_parnet.kernels.gpu.candidates import shared
from parallel_parnet.kernels.gpu.classifier import classifier_kernel
from parallel_parnet.kernels.gpu.compiled import resources, stand_in
from parallel_parnet.kernels.gpu.config import CONFIGS, Table
from parallel_parnet.kernels.gpu.convolution import Convolution
from parallel_parnet.kernels.gpu.geometry import Tile
from parallel_parnet.kernels.gpu.launch import Launch
from parallel_parnet.kernels.gpu.level import level
from parallel_parnet.kernels.gpu.maxpool import maxpool_kernel
from parallel_parnet.kernels.gpu.samples import convolution, geometry, without_values
from parallel_parnet.program.rivals import repvgg, resnet

VARIANTS = ("parnet_s", "parnet_m", "parnet_l", "parnet_xl")
SIZE = 224
META = torch.device("meta")
AMPERE, ADA, HOPPER, B200, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
MULTIPLIES = {HOPPER: "HGMMA", B200: "UTCHMMA"}  # in half precision; HMMA elsewhere
TENSOR_MEMORY = 512  # columns of a B200's multiprocessor
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A launch of a variant. device: the GPU whose tuned table is taken, or None for the defaults."""

    variant: str
    capability: tuple[int, int]
    dtype: torch.dtype
    batch: int
    index: int
    device: str | None = None

    def __str__(self) -> str:
        dtype, table = str(self.dtype).removeprefix("torch."), self.device or "defaults"
        return f"{self.variant}-sm_{self.capability[0]}{self.capability[1]}-{dtype}-n{self.batch}-{self.index}-{table}"


def tuned_tables() -> dict[str, tuple[int, int]]:
    """GPUs that have a table of their own, with their compute capability."""
    tables = map(json.loads, (path.read_text() for path in CONFIGS.glob("tuned.*.json")))
    return {table["gpu"]: tuple(table["capability"]) for table in tables}


def every_case() -> list[Case]:
    """Batch 8 is enough for the large tiles of the default table."""
    tables = [(capability, None) for capability in (HOPPER, AMPERE, B200)]
    tables += [(capability, gpu) for gpu, capability in tuned_tables().items()]
    return [
        Case(variant, capability, dtype, batch, index, gpu)
        for capability, gpu in tables
        for variant in VARIANTS
        for dtype in (*HALF, torch.float32)
        for batch in (1, 8)
        for index in range(12)
    ]


def chosen_cases() -> list[Case]:
    """All, or XL's at batch 1 on Hopper in fp16 and one in sixty of the rest."""
    cases = every_case()
    usual = ("parnet_xl", HOPPER, torch.float16, 1)
    first = [case for case in cases if (case.variant, case.capability, case.dtype, case.batch) == usual]
    return first + drawn((case for case in cases if case not in first), 1 / 60)


def launch(case: Case) -> Launch:
    """One launch of the plan that an executor would make."""
    table = Table.load(case.capability, case.device)
    return whole(shapes_of(case.variant), (case.batch, SIZE, SIZE), case.dtype, META, table).launches[case.index]


@pytest.mark.parametrize("case", chosen_cases(), ids=str)
def test_level(case: Case):
    """Compiles; fits; in half precision it multiplies by tensor cores, and on Hopper it spills nothing in a loop. For
    one picture, programs that wait for gates cannot keep those who make them from tensor memory."""
    prepared = launch(case)
    with stand_in(case.capability):
        compiled = prepared.compile()
    used = resources(compiled)
    assert used.threads == 32 * prepared.num_warps
    assert used.registers * used.threads <= 65536
    if case.capability == HOPPER and case.dtype in HALF:
        assert not used.complaints(case.capability), used
    if case.dtype in HALF:
        assert prepared.kernel is classifier_kernel or used.counts[MULTIPLIES.get(case.capability, "HMMA")] > 0, used
    if case.capability == B200 and case.batch == 1:
        assert compiled.metadata.tmem_size * used.blocks <= TENSOR_MEMORY


@pytest.mark.parametrize(
    ("variant", "index"), list(itertools.product(VARIANTS, range(11))) if ALL else [("parnet_s", 1), ("parnet_s", 8)]
)
def test_fp8(variant, index):
    """Tensor cores multiply bytes, a step's sum at a time; copies are of 16 bytes, unless groups begin between them;
    what is stored is converted by the instruction that makes the largest number of what is larger."""
    prepared = whole(shapes_in_fp8(shapes_of(variant)), (1, SIZE, SIZE), torch.bfloat16, META, Table.load(HOPPER))
    with stand_in(HOPPER):
        compiled = prepared.launches[index].compile()
    used, ptx = resources(compiled), compiled.asm["ptx"]
    assert not used.complaints(HOPPER), used
    assert used.counts["QGMMA" if index > 0 else "HGMMA"] > 0, used
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx or index == 10
    # what is stored is never converted back: ptxas of CUDA 12.8 does it before it has packed the words
    packed = re.findall(r"cvt\.rn\.satfinite\.e4m3x2\.f32\s+(%\w+), %", ptx)
    assert not set(packed) & set(re.findall(r"cvt\.rn\.f16x2\.e4m3x2\s+%\w+, (%\w+)", ptx))
    if index > 0:
        config = prepared.cuts[shapes_of(variant).launch_groups[index][0].name].tile
        assert set(re.findall(r"maxNumImpreciseAcc = (\d+)", compiled.asm["ttgir"])) == {str(config.bk)}
        assert all(".e4m3.e4m3" in line for line in re.findall(r"wgmma\.mma_async\S*", ptx))
        ragged = any(
            op.cin // op.groups // len(op.inputs) % 16
            for op in shapes_of(variant).launch_groups[index]
            if op.groups > 1
        )
        widths = set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx))
        assert widths == ({"0x8", "0x10"} if ragged else {"0x10"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [ADA, BLACKWELL], ids=str)
def test_the_largest_default_where_blocks_have_99_kb(capability, dtype):
    """Of all levels the one whose pipeline asks for the most shared memory: no more than was foretold."""
    table, levels = Table.load(capability), [each for name in VARIANTS for each in levels_of(shapes_of(name), 1, dtype)]
    configs = [table.level(each.shapes, 1, dtype) for each in levels]
    foretold, config, largest = max(zip((shared(c, dtype) for c in configs), configs, levels), key=itemgetter(0))
    made = [without_values(conv) for conv in operands(largest, config.tiles, 0, "cpu")]
    with stand_in(capability):
        compiled = level(made, config.num_warps, config.num_stages).compile()
    assert compiled.metadata.shared <= foretold <= 99 * 1024


@pytest.mark.parametrize("capability", [AMPERE, ADA, HOPPER], ids=str)
def test_the_probes_of_a_check(capability):
    """Those with dependent launches where there are such launches: elsewhere ptxas refuses them."""
    compile_probes(Target(capability, launchers=False))


@pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=str)
def test_a_picture_in_uint8(capability):
    """A network's first convolution, which converts raw values on their way to the tensor cores."""
    shape, dtype = geometry("picture", SIZE, SIZE, 64), torch.bfloat16
    config = Table.load(capability).level([shape], 1, dtype)
    conv = convolution(shape, config.tiles[0], 1, dtype, seed=0, border=True)
    raw = Convolution(conv.x._replace(a=conv.x.a.to(torch.uint8)), conv.shape, conv.tile)
    prepared = level([without_values(raw)], config.num_warps, config.num_stages)
    with stand_in(capability):
        used = resources(prepared.compile())
    assert not used.complaints(capability), used
    assert used.counts["HGMMA" if capability == HOPPER else "HMMA"] > 0, used


UNGATED = {
    "residual": resnet((1,), bottleneck=True, width=64),  # 7x7, a maximum, 1x1 with a projection, 3x3, 1x1 and residual
    "groups": repvgg((2,), (128,), groups=4),
}


@pytest.mark.parametrize(
    ("capability", "network", "index"),
    [(HOPPER, "residual", index) for index in range(5)] + [(HOPPER, "groups", 2)]
    + [(AMPERE, "residual", 2), (AMPERE, "groups", 2)],
    ids=str,
)  # fmt: skip
def test_operations_that_no_parnet_has(capability, network, index):
    prepared = whole(UNGATED[network], (1, SIZE, SIZE), torch.float16, META, Table.load(capability)).launches[index]
    with stand_in(capability):
        compiled = prepared.compile()
    used = resources(compiled)
    assert not used.complaints(capability), used
    assert prepared.kernel is maxpool_kernel or used.counts["HGMMA" if capability == HOPPER else "HMMA"] > 0, used
    assert "atom" not in compiled.asm["ptx"], "without gates and splits nobody waits"
    maxima = set(re.findall(r"\bmax(?:\.\w+)*\.f32", compiled.asm["ptx"]))
    assert maxima <= {"max.NaN.f32"}, "a NaN is not hidden"


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=str)
def test_ticket_stands_between_barriers(capability, dtype):
    """All threads' stores are made before one thread releases; none reads before that thread has acquired."""
    prepared = level([offline("identity", 14, 384, Tile(64, 64, 64, split_k=4), dtype)])
    with stand_in(capability):
        ptx = prepared.compile().asm["ptx"]
    check_ticket(ptx)


# an addition of nothing, which only acquires, becomes a load
ORDERED = {"acq_rel": r"atom\.global\.gpu\.acq_rel\.add", "release": r"(?:atom|red)\.global\.gpu\.release\.add",
           "acquire": r"(?:atom|ld)\.global\.gpu\.acquire"}  # fmt: skip


def check_ticket(ptx: str) -> None:
    """Looks at every atomic of a kernel's PTX and at the memory accesses around it."""
    for order, pattern in ORDERED.items():
        atomics = list(re.finditer(pattern, ptx))
        assert atomics, f"nothing with {order}"
        for atomic in atomics:
            if order != "acquire":
                stores = ptx.rfind("st.global", 0, atomic.start())
                assert stores >= 0 and "bar.sync" in ptx[stores : atomic.start()], "no barrier before the release"
            if order != "release":
                loads = re.compile(r"ld\.global").search(ptx, atomic.end())
                assert loads and "bar.sync" in ptx[atomic.end() : loads.start()], "no barrier after the acquire"


def test_a_missing_barrier_is_noticed():
    """The check above can fail."""
    with stand_in(HOPPER):
        ptx = level([offline("identity", 14, 384, Tile(64, 64, 64, split_k=4), HALF[0])]).compile().asm["ptx"]
    for atomic in [atomic for order in ("acq_rel", "release") for atomic in re.finditer(ORDERED[order], ptx)]:
        stores = ptx.rfind("st.global", 0, atomic.start())
        bare = ptx[:stores] + ptx[stores : atomic.start()].replace("bar.sync", "nop") + ptx[atomic.start() :]
        with pytest.raises(AssertionError, match="before the release"):
            check_ticket(bare)
    for atomic in [atomic for order in ("acq_rel", "acquire") for atomic in re.finditer(ORDERED[order], ptx)]:
        with pytest.raises(AssertionError, match="after the acquire"):
            check_ticket(ptx[: atomic.end()] + ptx[atomic.end() :].replace("bar.sync", "nop"))


def test_a_spill_is_noticed():
    """Tiles too large for the registers of four warps: the reader of cubins must say so."""
    prepared = level([offline("identity", 28, 256, Tile(128, 256, 64), torch.float16)], num_warps=4)
    with stand_in(HOPPER):
        used = resources(prepared.compile())
    assert used.in_loops > 0 and any("spills" in complaint for complaint in used.complaints(HOPPER)), used


def offline(kind: str, side: int, channels: int, tile: Tile, dtype: torch.dtype) -> Convolution:
    return without_values(convolution(geometry(kind, side, side, channels), tile, 1, dtype, seed=0))
