"""The table of tile shapes: defaults, rules, files of one GPU model."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from parallel_parnet import ParNetError
from parallel_parnet.commands.gpu.level_tuning import levels_of, worth_trying
from parallel_parnet.commands.gpu.precompile import shapes_of
from parallel_parnet.executors.triton_backend import TritonBackend, geometry
from parallel_parnet.kernels.gpu import config
from parallel_parnet.kernels.gpu.candidates import MOST_SPLITS, candidates, fitted, launched, resident, shared
from parallel_parnet.kernels.gpu.compiled import SPILLED, Resources
from parallel_parnet.kernels.gpu.config import LevelConfig, Table, key
from parallel_parnet.kernels.gpu.convolution import E4M3
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile
from parallel_parnet.kernels.gpu.level import level
from parallel_parnet.kernels.gpu.samples import convolution
from parallel_parnet.kernels.gpu.samples import geometry as sample
from parallel_parnet.transport.group import FIELD

HALF = torch.float16
DTYPES = torch.bfloat16, torch.float32
KB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}  # of a block, by NVIDIA's guide
# A10, L4, RTX 4090, RTX 5090, B200, H100 PCIe: compute capability and multiprocessors
SMALLER_AND_LARGER = (((8, 6), 72), ((8, 9), 58), ((8, 9), 128), ((12, 0), 170), ((10, 0), 148), ((9, 0), 114))
XL_LEVEL_5 = [Geometry(side, side, c, c, gate="identity") for c, side in ((200, 56), (400, 28), (800, 14))]


def test_the_longest_operation_is_shared_out():
    """One tile for all; K of the deepest operation is split first, and never among more than four programs."""
    found = candidates(XL_LEVEL_5, 1, HALF, Table.load((9, 0)).rates)
    assert len(found) > 1
    for chosen in found:
        assert len({replace(tile, split_k=1) for tile in chosen.config.tiles}) == 1
        splits = [tile.split_k for tile in chosen.config.tiles]
        assert splits == sorted(splits) and splits[-1] <= MOST_SPLITS


@pytest.mark.parametrize("dtype", [HALF, E4M3], ids=str)
@pytest.mark.parametrize("variant", ["parnet_s", "parnet_m", "parnet_l", "parnet_xl"])
def test_no_level_takes_two_waves(variant, dtype):
    """All programs of a picture that convolve have a place at once, as far as registers can be foretold."""
    table = Table.load((9, 0))
    program = shapes_of(variant)
    for group in program.launch_groups[:-1]:
        shapes = [geometry(program, op, 224, 224) for op in group]
        multiplied = HALF if shapes[0].planar else dtype
        config = table.level(shapes, 1, multiplied)
        assert launched(shapes, 1, config) <= resident(config, multiplied, table.rates) * table.rates.multiprocessors


@pytest.mark.parametrize(("capability", "count"), SMALLER_AND_LARGER)
def test_a_gpus_own_multiprocessors_decide_how_many_programs_there_are(capability, count, monkeypatch):
    """And its own shared memory how many have a place: none waits for one where any cut has a place for all."""
    found = SimpleNamespace(multi_processor_count=count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Unheard")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(config, "refused", lambda device: None)
    with pytest.warns(UserWarning, match="no tuned kernels for NVIDIA Unheard"):
        rates = Table.of_device(torch.device("cuda")).rates
    assert rates == Table.load(capability, multiprocessors=count).rates and rates.multiprocessors == count
    table = Table(rates, {})
    for at in (at for name in ("parnet_s", "parnet_xl") for at in levels_of(shapes_of(name), 1, HALF)):

        def waits(chosen: LevelConfig, at=at) -> bool:
            there = (rates.shared + 1024) // (
                shared(chosen, HALF) + 1024
            )  # a multiprocessor has 1 KB more than a block
            assert resident(chosen, HALF, rates) <= there
            return launched(at.shapes, 1, chosen) > resident(chosen, HALF, rates) * count

        tried = [each.config for each in candidates(at.shapes, 1, HALF, rates)]
        assert not waits(table.level(at.shapes, 1, HALF)) or all(map(waits, tried)), at.key


def test_ranks_whose_gpus_cut_otherwise_are_told_of_them_apart():
    """In what `agree` compares, which is so many bytes."""
    tables = [Table.load((9, 0), multiprocessors=count) for count in (114, 132)]
    few, many = (TritonBackend.tiles.fget(SimpleNamespace(table=table)) for table in tables)
    assert few.endswith(" for 114 multiprocessors") and many.endswith(" for 132 multiprocessors")
    assert few[:16] != many[:16] and len(few) <= FIELD


def test_steps_in_fp8():
    """As many bytes as in half precision, and half of them where groups begin in the middle of a copy."""
    rates = Table.load((9, 0)).rates
    for shape, bk in ((Geometry(14, 14, 400, 400), 128), (Geometry(28, 28, 800, 800, 2, 2, inputs=2), 64)):
        (tile,) = candidates([shape], 1, E4M3, rates)[0].config.tiles
        assert tile.bk == bk


def test_steps_of_half_as_many_channels_where_they_spare_products():
    """ParNet-S's 92 channels fill three steps of 32, and but seven tenths of two steps of 64."""
    assert fitted([Geometry(56, 56, 92, 92)], 64, 64, 64).bk == 32
    assert fitted([Geometry(56, 56, 200, 200)], 64, 64, 64).bk == 64


@pytest.mark.parametrize(("dtype", "least"), [(E4M3, 32), (HALF, 16), (torch.float32, 16)])
def test_steps_hold_a_tensor_cores_product(dtype, least):
    """Also where an operation has fewer channels, as the demo's first stream."""
    narrow = [Geometry(32, 32, channels, channels, inputs=inputs) for channels in (8, 16, 32) for inputs in (1, 2)]
    for shape in narrow:
        found = candidates([shape], 1, dtype, Table.load((9, 0)).rates)
        assert found and all(tile.bk >= least for each in found for tile in each.config.tiles), shape


def test_no_tile_is_wider_than_its_operation():
    (tile,) = Table.load((9, 0)).level([Geometry(8, 8, 3, 20, planar=True, stride=2)], 1, HALF).tiles
    assert (tile.bn, tile.bk, tile.split_k) == (32, 32, 1)


def test_newer_gpus_take_the_newest_defaults_and_older_ones_are_refused():
    assert Table.load((10, 0)).rates == Table.load((9, 0)).rates
    for capability, family in (((12, 0), (9, 0)), ((12, 1), (9, 0)), ((8, 9), (8, 0))):
        assert Table.load(capability).rates == replace(Table.load(family).rates, shared=99 * 1024)
    with pytest.raises(ParNetError, match="compute capability"):
        Table.load((7, 5))


@pytest.mark.parametrize("capability", KB, ids=str)
def test_no_gpu_is_given_more_shared_memory_than_it_has(capability):
    """By default; and of the longer pipelines that a tuner tries."""
    table, names = Table.load(capability), ("parnet_s", "parnet_m", "parnet_l", "parnet_xl")
    for at in (at for name in names for dtype in DTYPES for at in levels_of(shapes_of(name), 1, dtype)):
        tried = [table.level(at.shapes, 1, at.dtype), *worth_trying(at, table, table.rates)]
        assert max(shared(config, at.dtype) for config in tried) <= 1024 * KB[capability]


def test_a_sister_is_of_the_same_compute_capability():
    """The H200's tiles, of which some take more shared memory than a newer GPU has, are for Hoppers alone."""
    with pytest.warns(UserWarning, match="taking those timed on an NVIDIA H200"):
        assert Table.load((9, 0), "NVIDIA H100").levels
    for capability in ((10, 0), (12, 0)):
        with pytest.warns(UserWarning, match="taking the defaults"):
            assert not Table.load(capability, "NVIDIA Newer").levels


def test_a_tuned_level_overrides_the_rules_and_a_missing_file_is_said(tmp_path, monkeypatch):
    tuned = {"tiles": [[64, 64, 64, 1], [64, 64, 64, 2], [64, 64, 64, 5]], "num_warps": 4, "num_stages": 3}
    levels = {key(XL_LEVEL_5, 1, HALF): tuned}
    (tmp_path / "tuned.NVIDIA_H200.json").write_text(json.dumps({"levels": levels}))
    monkeypatch.setattr(config, "CONFIGS", tmp_path)
    table = Table.load((9, 0), "NVIDIA H200")
    assert table.level(XL_LEVEL_5, 1, HALF) == LevelConfig((Tile(), Tile(split_k=2), Tile(split_k=5)), 4, 3)
    assert table.level(XL_LEVEL_5, 2, HALF) == Table.load((9, 0)).level(XL_LEVEL_5, 2, HALF)
    with pytest.warns(UserWarning, match="no tuned kernels for NVIDIA Unheard"):
        Table.load((9, 0), "NVIDIA Unheard")
    lacking = "warpgroups.NVIDIA_H200.json"
    with pytest.warns(UserWarning, match=f"no tuned kernels for NVIDIA H200, {lacking}: taking"):
        Table.load((9, 0), "NVIDIA H200", warpgroups=True)
    (tmp_path / lacking).write_text('{"levels": {}}')
    (tmp_path / "tuned.NVIDIA_H200.json").unlink()
    with pytest.warns(UserWarning, match=r"no tuned kernels for NVIDIA H200, tuned.NVIDIA_H200.json: taking"):
        Table.load((9, 0), "NVIDIA H200", warpgroups=True)


def test_levels_that_differ_have_names_that_differ():
    """Else one would take what was timed for the other."""
    shape = Geometry(14, 14, 64, 64)
    changes = ({}, {"h": 28}, {"w": 28}, {"cin": 32}, {"cout": 32}, {"stride": 2}, {"groups": 2}, {"inputs": 2})
    shapes = [replace(shape, **change) for change in changes]
    shapes += [replace(shape, gate="none", kernel=kernel) for kernel in (1, 3)]
    names = [key([each], n, dtype) for each in shapes for n in (1, 2) for dtype in (HALF, torch.float32)]
    assert len(set(names)) == len(names) == 40


def test_what_a_kernel_cannot_number_is_refused():
    """Values by offsets of 32 bits, and the rows of a picture's taps by bits of a number."""
    Geometry(2**13, 2**14 - 1, 8, 8)
    with pytest.raises(ParNetError, match="too large for 32-bit offsets"):
        Geometry(2**13, 2**14, 8, 8)
    with pytest.raises(ParNetError, match="bk 512: the rows of a picture's taps"):
        convolution(sample("picture", 7, 5, 20), Tile(16, 16, 512), 1, HALF, 0).check()


def test_operations_on_other_pictures_are_no_level():
    pair = [convolution(sample("plain", 3, 3, 8), Tile(16, 16, 16), n, HALF, 0) for n in (1, 2)]
    with pytest.raises(ParNetError, match="as many pictures, on one device"):
        level(pair)
    with pytest.raises(ParNetError, match="at least one convolution"):
        level([])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"spilled": SPILLED + 1}, "spills 97 bytes, 0 times in loops"), ({"in_loops": 2}, "2 times in loops"),
        ({"serialised": True}, "one product after the other"), ({"stack": 97}, "97 bytes of stack"),
        ({"local": 97}, "97 of local memory"), ({"shared": 2**18}, "262144 bytes of shared memory"),
        ({"registers": 255, "threads": 512}, "255 registers x 512 threads"),
    ],
    ids=str,
)  # fmt: skip
def test_what_would_run_badly_is_told(change, says):
    fine = Resources(168, 128, 1000, 96, 96, SPILLED, 0, False, 10, {"QGMMA": 0})
    assert not fine.complaints((9, 0)) and not replace(fine, serialised=True, counts={"QGMMA": 1}).complaints((9, 0))
    (complaint,) = replace(fine, **change).complaints((9, 0))
    assert says in complaint
