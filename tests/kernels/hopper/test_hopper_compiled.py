"""What NVIDIA's compiler, where at hand, makes of the timed levels: products side by side, and nothing spilled; and how
a launch is prepared."""

from __future__ import annotations

import ctypes
import gc
import random
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from parallel_parnet import ParNetError, ParNetWarning
from parallel_parnet.commands.gpu.compile_report import resources_for_warpgroups as resources
from parallel_parnet.commands.gpu.level_tuning import Level, levels_of, operands
from parallel_parnet.commands.gpu.precompile import shapes_of
from parallel_parnet.kernels.gpu import config
from parallel_parnet.kernels.gpu.config import HOPPER, Table, bindings
from parallel_parnet.kernels.gpu.geometry import WarpTile
from parallel_parnet.kernels.gpu.samples import convolution, geometry, without_values
from parallel_parnet.kernels.hopper.plan import TAPS, candidates
from parallel_parnet.kernels.hopper.source import FOLDER, Source, source

pytestmark = pytest.mark.skipif(not bindings(), reason="needs cuda-bindings and NVRTC")
DTYPES = (torch.float16, torch.bfloat16)
TABLE = Table.load(HOPPER, "NVIDIA H200", warpgroups=True)


def a_level(*variants: str) -> Level:
    """Any that is timed, of one of these networks, in half precision."""
    levels = levels_of(shapes_of(random.choice(variants)), 1, random.choice(DTYPES))
    return random.choice([level for level in levels if level.key in TABLE.warpgroups])


def source_of(wanted: Level, tiles: Sequence[WarpTile]) -> Source:
    return source([without_values(conv) for conv in operands(wanted, tiles, 0, "cpu")])


@pytest.mark.parametrize("variant", ["parnet_s", "parnet_m", "parnet_l", "parnet_xl"])
def test_a_timed_level(variant):
    wanted = a_level(variant)
    used = resources(source_of(wanted, TABLE.of_warpgroups(wanted.shapes, 1, wanted.dtype)))
    assert not used.complaints(HOPPER) and not used.spilled, (wanted.key, wanted.dtype)
    assert used.counts["HGMMA"] >= len(wanted.shapes)


def test_what_does_not_compile_says_why():
    from parallel_parnet.kernels.hopper.launch import compiled

    wanted = a_level("parnet_s", "parnet_xl")
    text = source_of(wanted, TABLE.of_warpgroups(wanted.shapes, 1, wanted.dtype)).text
    with pytest.raises(ParNetError, match=r"does not compile: .*undefined"):
        compiled(text.replace("constexpr int BARRIERS", "constexpr int OTHERS"))


def test_a_launch_is_prepared_once(monkeypatch):
    """And goes to the CUDA stream of the moment, with the cluster, threads and memory of its source."""
    from parallel_parnet.kernels.hopper import launch

    made = [convolution(geometry("plain", 9, 9, 32), WarpTile(64, 32, 32, 2, 2), 1, DTYPES[0], 0)]
    prepared, loaded, calls = launch.level(made, early=False), [], []

    def start(config, function, parameters, extra):
        gc.collect()  # of what nobody keeps
        cluster, early = (attribute.value for attribute in config.attrs)
        sizes = config.gridDimX, config.blockDimX, config.sharedMemBytes, cluster.clusterDim.x, config.numAttrs
        calls.append((int(config.hStream), function, ctypes.c_void_p.from_address(parameters).value, sizes))
        assert early.programmaticStreamSerializationAllowed == 0
        return (0,)

    monkeypatch.setattr(launch.driver, "cuLaunchKernelEx", start)
    monkeypatch.setattr(launch, "loaded", lambda *given: loaded.append(given) or "kernel")
    for stream in (5, 7):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, s=stream: SimpleNamespace(cuda_stream=s))
        prepared()
    source = prepared.source
    assert source.cluster == 2 and loaded == [(source.text, source.shared, prepared.device)]
    sizes = source.blocks, source.threads, source.shared, source.cluster, 2
    assert calls == [(stream, "kernel", ctypes.addressof(prepared.addresses), sizes) for stream in (5, 7)]


def test_steps_of_several_taps():
    """The most promising, for any level: nothing spilled."""
    taps, wanted = random.choice(TAPS), a_level("parnet_s", "parnet_m")
    tiles = next(tiles for _, tiles in candidates(wanted.shapes, 1) if tiles[0].taps == taps)
    used = resources(source_of(wanted, tiles))
    assert not used.complaints(HOPPER) and not used.spilled, (wanted.key, taps)


def test_slow_products_are_told_of(monkeypatch):
    """Once, with the levels' names."""
    from parallel_parnet.kernels.hopper import launch

    def of(channels: int, name: str) -> launch.WarpLaunch:
        shape = geometry("plain", 9, 9, channels)
        return launch.level([convolution(shape, WarpTile(64, 32, 32, 1, 2), 1, DTYPES[0], 0)], name)

    made, slow = [of(32, "level 1"), of(64, "level 2"), of(32, "level 3"), of(96, "level 4")], {0, 1}
    said = "ptxas info: (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    logs = {each.source.text: (b"", said if i in slow else "") for i, each in enumerate(made) if i != 2}
    monkeypatch.setattr(launch, "compiled", logs.__getitem__)
    with pytest.warns(ParNetWarning, match=r"^NVRTC \d+\.\d+ makes 2 of 3 kernels slow, one product after .*") as told:
        launch.prepare([*made, "a launch of Triton's"])
    assert len(told) == 1
    slow.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(launch, "compiled", lambda text: (b"", ""))
        launch.prepare(made)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("version", [(11, 8), (12, 0), (12, 6), (12, 8), (12, 9), (13, 0), ()])
def test_sums_have_values_where_compilers_are_slow_without(version):
    """Before 12.9, as was tried of 12.6, 12.8, 12.9 and 13.0; the emulator, which has no version, as the newest."""
    names = ("__CUDACC_VER_MAJOR__", "__CUDACC_VER_MINOR__")
    given = [f"-D{name}={number}" for name, number in zip(names, version)]
    command = ["g++", "-E", "-P", *given, "-x", "c++", str(FOLDER / "level.cu")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert ("float sums[s.bn / 2] = {};" in text) == ((0,) < version < (12, 9))
    assert text.count("float sums[s.bn / 2]") == 1


def test_products_one_after_the_other_are_seen():
    """Sums that somebody looks at between two products."""
    made = source([convolution(geometry("plain", 9, 9, 32), WarpTile(64, 32, 32, 1, 2), 1, DTYPES[0], 0)])
    looked_at = made.text.replace("products_end();", "products_end(); if (sums[0] > 1e30f) sums[1] = 0;")
    assert looked_at != made.text
    assert "multiplies one product after the other" in resources(made._replace(text=looked_at)).complaints(HOPPER)


@pytest.mark.parametrize("reason", [None, "CUDA: CUDA_ERROR_NO_BINARY_FOR_GPU"])
def test_a_hopper_on_which_it_cannot_be_had_takes_tritons(reason, monkeypatch):
    from parallel_parnet.kernels.hopper import launch

    def loaded(text, shared, device):
        assert launch.compiled(text)[0].startswith(b"\x7fELF")
        if reason:
            raise ParNetError(reason)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(launch, "loaded", loaded)
    monkeypatch.setattr(config, "refused", config.refused.__wrapped__)  # which remembers the other case's
    with pytest.warns(UserWarning, match=f"{reason}: Triton's kernels") if reason else nullcontext():
        table = Table.of_device(torch.device("cuda"))
    assert table.levels and bool(table.warpgroups) == (reason is None)
