"""The whole narrow golden network through the interpreter, launch by launch, against the released code's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel_parnet import Placement, Program, load_checkpoint
from parallel_parnet.executors.graph import GraphExecutor
from parallel_parnet.executors.local import LocalExecutor
from parallel_parnet.executors.triton_backend import TritonBackend
from parallel_parnet.kernels.gpu.interpreter import run_order
from parallel_parnet.preprocess import Preprocess
from parallel_parnet.program.fold import fold
from parallel_parnet.program.pixels import fold_pixels

GOLDEN = Path(__file__).parents[3] / "golden"
CPU = torch.device("cpu")


def placed(program: Program, dtype: torch.dtype, lanes: int = 1, raw: bool = False) -> LocalExecutor:
    placement = Placement.by_streams(program, lanes)
    devices = [CPU] * lanes
    return LocalExecutor(placement, devices, TritonBackend(program, placement.segments(program), devices, dtype, raw))


def run(activation: str, dtype: torch.dtype, pictures: int, case: int = 0, ema: bool = False, lanes: int = 1) -> float:
    """Largest error of the logits, relative to the largest logit."""
    model = load_checkpoint(GOLDEN / f"official_narrow_{activation}.pth.tar", ema=ema, activation=activation)
    golden = torch.load(GOLDEN / f"official_narrow_{activation}.golden.pt", weights_only=True)["cases"][case]
    logits = placed(fold(model), dtype, lanes)(golden["input"][:pictures])
    expected = golden["logits_ema" if ema else "logits"][:pictures]
    return ((logits - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("activation", "lanes"), [("silu", 1), ("relu", 3)])
def test_fp32(activation, lanes):
    assert run(activation, torch.float32, pictures=2, lanes=lanes) < 1e-5


@pytest.mark.parametrize(
    ("activation", "dtype", "lanes"), [("silu", torch.float16, 1), ("relu", torch.bfloat16, 3)], ids=str
)
def test_half(activation, dtype, lanes):
    assert run(activation, dtype, pictures=1, lanes=lanes) < 1e-2


@pytest.mark.long
def test_averaged_weights_and_a_larger_picture():
    assert run("silu", torch.float32, pictures=2, ema=True) < 1e-5
    assert run("silu", torch.float32, pictures=2, case=1) < 1e-5


def test_raw_pictures_in_a_graph(seed):
    """uint8 in, through the launches that a CUDA graph would replay, against the training form."""
    model = load_checkpoint(GOLDEN / "official_narrow_silu.pth.tar", activation="silu")
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = model(Preprocess.of(model.config).normalise(pixels.movedim(1, -1)))
    dtype = torch.float16
    executor = GraphExecutor("cuda_graph", placed(fold_pixels(fold(model), dtype), dtype, raw=True))
    logits = executor(pixels)
    assert executor.buffers(pixels.shape)[0].dtype == torch.uint8
    assert ((logits - expected).abs().max() / expected.abs().max()).item() < 1e-2


def test_repeats_are_the_same_bits(seed):
    """Over poisoned buffers, in another order of programs, and whatever the buffers held before."""
    model = load_checkpoint(GOLDEN / "official_narrow_silu.pth.tar", activation="silu")
    executor = placed(fold(model), torch.float16)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    first = executor(x).clone()
    executor(torch.randn_like(x))
    with run_order(seed):
        assert torch.equal(executor(x), first)
