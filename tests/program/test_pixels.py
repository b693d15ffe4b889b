"""Raw pictures: uint8 in, the logits of the normalised picture out, whatever runs the network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel_parnet import Config, Engine, ParNet, Placement, fold, load_checkpoint
from parallel_parnet.executors.segment import SegmentModule
from parallel_parnet.preprocess import Preprocess
from parallel_parnet.program.pixels import fold_pixels
from parallel_parnet.program.placement import Segment
from parallel_parnet.program.program import Program
from small import GOLDEN, OPTIONAL, SMALL, lively, relative

MODEL = lively(SMALL, 7)
PROGRAM = fold(MODEL)
CPU = torch.device("cpu")
LIMIT = 1e-4  # lively networks amplify rounding on flat pictures; a shift that counts padding is 100 times further off
EXECUTORS = ["reference", "eager", *OPTIONAL]


def expected(model: ParNet, pixels: Tensor) -> Tensor:
    """The training form's logits for the picture normalised as for training."""
    with torch.no_grad():
        return model(Preprocess.of(model.config).normalise(pixels.movedim(1, -1)))


def pictures(*shape: int) -> Tensor:
    """Noise, and beside it a white and a black picture, where a shift that counts padding would show most."""
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    x[-1], x[-2 if shape[0] > 1 else -1] = 0, 255
    return x


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_executor_and_lane(executor: str, lanes: int) -> None:
    placement = Placement.by_streams(PROGRAM, lanes)
    engine = Engine(PROGRAM, placement, CPU, executor=executor)
    for shape in ((3, 3, 64, 32), (1, 3, 32, 32)):
        x = pictures(*shape)
        assert relative(engine(x), expected(MODEL, x)) < LIMIT
    assert relative(engine(x.float()), engine(x)) > 0.1, "floating pictures are taken as normalised"


def test_large_batches() -> None:
    x = pictures(64, 3, 32, 32)
    assert relative(Engine(PROGRAM, device="cpu", executor="eager")(x), expected(MODEL, x)) < LIMIT


def test_the_limit_would_see_a_shift_that_counts_padding() -> None:
    folded = fold_pixels(PROGRAM, torch.float32)
    border = folded.weights["inits.0.0.border"]
    everywhere = {
        "inits.0.0.border": torch.zeros_like(border),
        "inits.0.0.bias": folded.weights["inits.0.0.bias"] + border.sum((1, 2)),
    }
    wrong = Program(folded.config, folded.operations, {**folded.weights, **everywhere})
    x = pictures(3, 3, 64, 64)
    assert relative(Engine(wrong, device="cpu", executor="reference")(x.float()), expected(MODEL, x)) > 100 * LIMIT


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_any_layout(layout: torch.memory_format) -> None:
    x = pictures(2, 3, 32, 64).contiguous(memory_format=layout)
    assert relative(Engine(PROGRAM, device="cpu")(x[:, :, :, ::2]), expected(MODEL, x[:, :, :, ::2])) < LIMIT


def test_a_first_block_with_an_identity() -> None:
    model = lively(Config((3, 4, 8, 16), blocks=(1, 1, 1), num_classes=5, stem_strides=(1, 1)), 1)
    program = fold(model)
    assert program.operations[0].gate == "identity"
    x = pictures(2, 3, 32, 32)
    assert relative(Engine(program, device="cpu", executor="reference")(x), expected(model, x)) < LIMIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_do_no_more_harm_than_to_normalised_pictures(dtype: torch.dtype) -> None:
    """In the kernels' arithmetic: rounded weights, everything else in fp32."""
    program = fold(load_checkpoint(GOLDEN / "official_narrow_silu.pth.tar"))
    op = program.operations[0]

    def first(source: Program, x: Tensor, rounded: bool) -> Tensor:
        weights = {
            name: tensor.to(dtype).float() if rounded and name.endswith("weight") else tensor
            for name, tensor in source.weights.items()
        }
        segment = Segment(0, (op.name,), op.inputs, (op.name,))
        return SegmentModule(Program(source.config, source.operations, weights), segment, torch.float32, CPU)(x)[0]

    x = pictures(4, 3, 64, 64)
    normalised = Preprocess.of(program.config).normalise(x.movedim(1, -1))
    exact = first(program, normalised, rounded=False)
    of_normalised = relative(first(program, normalised.to(dtype).float(), rounded=True), exact)
    assert relative(first(fold_pixels(program, dtype), x.float(), rounded=True), exact) < 1.1 * of_normalised


def test_half_precision_networks() -> None:
    program = fold(load_checkpoint(GOLDEN / "official_narrow_silu.pth.tar"))
    x = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    exact = Engine(program, device="cpu", executor="reference")(x)
    assert relative(Engine(program, device="cpu", executor="eager", dtype=torch.bfloat16)(x), exact) < 2e-2
