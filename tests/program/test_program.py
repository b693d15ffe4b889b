"""The program as data: levels, parameters, cost, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parallel_parnet import VARIANTS, Engine, ParNetError, Program, create_model, fold
from parallel_parnet.commands.gpu.precompile import shapes_of
from small import SMALL, lively

# parameters in millions and GFLOPs at 224 x 224, fused: counted from the released code; the paper gives the same
# figures rounded (arXiv 2110.07641, table of ImageNet results)
PUBLISHED = {
    "parnet_s": (19.13, 9.47), "parnet_m": (35.58, 17.16), "parnet_l": (54.91, 26.65), "parnet_xl": (84.96, 41.43),
}  # fmt: skip
TRAINING_FORM = {"parnet_s": 20.93, "parnet_m": 38.95, "parnet_l": 60.18, "parnet_xl": 93.18}
CIFAR = {"parnet_cifar_1m": 1.3, "parnet_cifar_15m": 15.5, "parnet_cifar_35m": 35.0}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    program = shapes_of(name)
    parameters, gflops = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(TRAINING_FORM[name], rel=0.01)
    assert program.parameters / 1e6 == pytest.approx(parameters, rel=0.01)
    assert program.cost(224).flops / 1e9 == pytest.approx(gflops, rel=0.01)
    assert program.depth == 12
    assert [op.kind for op in program.operations].count("conv") == 22
    assert [op.kind for op in program.operations].count("classifier") == 1


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_sizes(name: str) -> None:
    program = shapes_of(name)
    assert program.parameters / 1e6 == pytest.approx(CIFAR[name], rel=0.01)
    assert program.depth == 12
    assert program.shape(program.output, 2, 32, 32) == (2, 10)


def test_levels_of_the_design() -> None:
    levels = {op.name: op.level for op in shapes_of("parnet_s").operations}
    expected = {"inits.0.0": 1, "inits.0.1": 2, "inits.1": 3, "inits.2": 4, "downsamples_2.0": 7, "downsamples_2.1": 9}
    expected |= {f"streams.0.{i}": 3 + i for i in range(4)} | {f"streams.1.{i}": 4 + i for i in range(5)}
    expected |= {f"streams.2.{i}": 5 + i for i in range(5)} | {"combine.2": 10, "combine.3": 11, "head.fc": 12}
    assert levels == expected


def test_flops_agree_with_torch() -> None:
    program = fold(lively(SMALL, 0))
    with FlopCounterMode(display=False) as counter:
        Engine(program, executor="eager", device="cpu")(torch.randn(2, 3, 64, 96))
    counted = counter.get_total_flops()
    square = program.cost(64, batch=2).flops  # the border maps, which torch counts, are under 2% here
    assert counted == pytest.approx(square * 1.5, rel=0.02)


def test_cost_adds_up() -> None:
    cost = fold(create_model(SMALL)).cost(64)
    for field in ("level", "label"):
        parts = cost.by(field).values()
        assert sum(part.flops for part in parts) == cost.flops
        assert sum(part.bytes for part in parts) == cost.bytes
    assert list(cost.by("level")) == list(range(1, 13))


def test_bytes_and_flops_of_one_operation() -> None:
    program = fold(create_model(SMALL))
    row = next(row for row in program.cost(64, batch=2, itemsize=2).operations if row.name == "streams.0.0")
    pixels, width = 16 * 16, 8
    weights = width * width * 9 + width * width + 4 * width  # kernel, gate; bias, gate bias, scale, shift
    assert row.bytes == 2 * (2 * 2 * pixels * width + weights)
    assert row.flops == 2 * 2 * (pixels * width * width * 9 + width * width)


def test_table_names_every_operation() -> None:
    program = shapes_of("parnet_s")
    lines = program.table().splitlines()
    assert len(lines) == 1 + len(program.operations)
    assert all(any(op.name in line for line in lines) for op in program.operations)


@pytest.mark.parametrize("name", ["parnet_fashion", "parnet_cifar_1m"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    program = fold(lively(VARIANTS[name], 3))
    program.save(tmp_path / "p.safetensors")
    loaded = Program.load(tmp_path / "p.safetensors")
    assert loaded.digest == program.digest
    assert loaded.operations == program.operations
    assert loaded.config == program.config
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(Engine(loaded, executor="reference")(x), Engine(program, executor="reference")(x))


@pytest.mark.parametrize(
    "use",
    [
        lambda program, path: program.digest, lambda program, path: program.save(path / "p.safetensors"),
        lambda program, path: program.to_onnx(), lambda program, path: program.to_exported_program(),
        lambda program, path: Engine(program, device="cpu"),
    ],
    ids=["digest", "save", "onnx", "export", "engine"],
)  # fmt: skip
def test_shapes_alone(use: Callable[[Program, Path], object], tmp_path: Path) -> None:
    """Of a model on meta there are costs, and nothing that has to know values."""
    program = shapes_of("parnet_s")
    assert program.cost().flops > 0
    with pytest.raises(ParNetError, match="is on the device meta, without its values"):
        use(program, tmp_path)


def test_digest_tells_programs_apart() -> None:
    first, second = fold(lively(SMALL, 0)), fold(lively(SMALL, 1))
    assert first.digest != second.digest
    second.weights["head.fc.bias"].copy_(first.weights["head.fc.bias"])
    changed = fold(lively(SMALL, 0))
    changed.weights["head.fc.bias"][0] += 1e-6
    assert changed.digest != first.digest


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    for absent in (path, "n" * 300):
        with pytest.raises(ParNetError, match="no such program file"):
            Program.load(absent)
    fold(create_model(SMALL)).save(path)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ParNetError, match=r"p\.safetensors"):
            Program.load(path)
    path.write_bytes(whole.replace(b"parallel_parnet.program.1", b"parallel_parnet.program.9"))
    with pytest.raises(ParNetError, match=r"not a program .*: load_checkpoint reads checkpoints"):
        Program.load(path)


@pytest.mark.parametrize("numbers", [{"size": 0}, {"size": 33}, {"size": -64}, {"batch": 0}, {"batch": -3}])
def test_numbers_that_no_cost_has(numbers: dict[str, int]) -> None:
    with pytest.raises(ParNetError, match=r"positive multiples of 32|both must be at least 1"):
        fold(create_model(SMALL)).cost(**numbers)
