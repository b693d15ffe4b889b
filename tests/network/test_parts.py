"""Edited networks: folded, and saved, as what they are, or refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from parallel_parnet import (
    Engine,
    ParNet,
    ParNetBlock,
    ParNetError,
    ParNetWarning,
    create_model,
    fold,
    load_checkpoint,
    save_checkpoint,
)
from parallel_parnet.commands.common import read_checkpoint
from parallel_parnet.errors import warn
from parallel_parnet.parity import relative
from parallel_parnet.program.program import Program
from small import SMALL, lively


def first(model: ParNet) -> ParNetBlock:
    block = model.streams[2][0]
    assert isinstance(block, ParNetBlock)
    return block


def dilate(conv: nn.Conv2d) -> None:
    conv.dilation = conv.padding = (2, 2)


def finer(block: ParNetBlock) -> None:
    """Features 16 pixels apart, as for segmentation."""
    block.block.rbr_dense.conv.stride = (1, 1)
    block.block.rbr_1x1[0] = nn.Identity()  # type: ignore[index]


def patch(model: ParNet) -> None:
    block = first(model)
    forward = block.forward
    block.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def postpone(model: ParNet) -> None:
    """A stream's first block, which keeps its name and computes last."""
    blocks = model.streams[2]._modules
    blocks["0"] = blocks.pop("0")


class Doubled(ParNetBlock):
    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x_nchw)


class Rectified(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(input))


class Adapted(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def patch_norm(model: ParNet) -> None:
    norm = first(model).block.rbr_dense.bn
    forward = norm.forward
    norm.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


EDITS: dict[str, tuple[Callable[[ParNet], object], str]] = {
    "dilated": (lambda m: dilate(first(m).block.rbr_dense.conv), r"2\.0\.block\..*conv is Conv2d\(.*dilation=\(2, 2\)"),
    "reflecting": (lambda m: setattr(first(m).block.rbr_dense.conv, "padding_mode", "reflect"), "padding_mode=reflect"),
    "finer": (lambda m: finer(m.combine[3]), r"combine\.3\."),  # type: ignore[arg-type]
    "between": (lambda m: m.combine.__setitem__(1, nn.ReLU()), r"combine\.1 is ReLU\(\), where a ParNet has Identity"),
    "behind": (lambda m: m.inits.__setitem__(1, nn.Sequential(m.inits[1], nn.ReLU())), r"inits\.1 is Sequential"),
    "normed": (lambda m: m.head.update({"dropout": nn.LayerNorm(64)}), r"head\.dropout is LayerNorm"),
    "patched": (patch, r"streams\.2\.0 is"),
    "subclassed": (lambda m: m.streams[2].__setitem__(0, Doubled(32, 32)), r"streams\.2\.0 is Doubled"),
    "rectified": (lambda m: setattr(first(m).block.rbr_dense, "bn", Rectified(32)), r"rbr_dense\.bn is Rectified"),
    "patched norm": (patch_norm, r"rbr_dense\.bn is .* of another forward or setting, where a ParNet has BatchNorm2d"),
    "adapted": (lambda m: m.head.update({"fc": Adapted(m.num_features, 10)}), r"head\.fc is Adapted"),
    "sum": (lambda m: first_pooled(m).__setitem__(0, nn.AvgPool2d(2, divisor_override=1)), r"AvgPool2d.* setting"),
    "postponed": (postpone, r"streams\.2 is Sequential"),
    "maximum": (lambda m: first_pooled(m).__setitem__(0, nn.MaxPool2d(2)), r"MaxPool2d"),
}


def first_pooled(model: ParNet) -> nn.Sequential:
    branch = model.inits[1].block.rbr_1x1  # type: ignore[union-attr]
    assert isinstance(branch, nn.Sequential)
    return branch


@pytest.mark.parametrize("edit", EDITS)
def test_other_networks_are_refused(edit: str, tmp_path: Path) -> None:
    """They would be folded, and saved, as the network that they were made of."""
    model, (change, words) = lively(SMALL, 0), EDITS[edit]
    change(model)
    for use in (fold, lambda edited: save_checkpoint(edited, tmp_path / "c.safetensors")):
        with pytest.raises(ParNetError, match=words):
            use(model)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("change", [dilate, lambda conv: setattr(conv, "padding_mode", "reflect")])
def test_another_block_is_refused(change: Callable[[nn.Conv2d], object]) -> None:
    block = ParNetBlock(8, 8).eval()
    change(block.block.rbr_dense.conv)
    with pytest.raises(ParNetError, match=r"rbr_dense\.conv is Conv2d"):
        block.fold()


def test_a_block_of_another_kind_is_refused() -> None:
    with pytest.raises(ParNetError, match=r"^the network is Doubled\("):
        Doubled(8, 8).eval().fold()


def sparse(conv: nn.Conv2d) -> None:
    prune.l1_unstructured(conv, "weight", 0.3)


@pytest.mark.parametrize("change", [sparse, parametrizations.spectral_norm, parametrizations.weight_norm])
@torch.no_grad()
def test_weights_that_are_computed(change: Callable[[nn.Conv2d], object]) -> None:
    model = lively(SMALL, 0)
    for conv in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
        change(conv)
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    assert relative(Engine(fold(model), executor="reference")(x), model(x)) < 1e-4


@pytest.mark.parametrize("change", [sparse, nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
@torch.no_grad()
def test_weights_that_a_hook_makes(change: Callable[[nn.Conv2d], object]) -> None:
    """Loaded, or trained on: until the next pass the attribute `weight` is that of the last one."""
    trained, model = lively(SMALL, 0), lively(SMALL, 1)
    for network in (trained, model):
        for conv in [module for module in network.modules() if isinstance(module, nn.Conv2d)]:
            change(conv)
    model.load_state_dict(trained.state_dict())
    program, block = fold(model), model.streams[0][0].fold()  # type: ignore[union-attr,operator]
    x, y = torch.randn(1, 3, 64, 64), torch.randn(1, 8, 16, 16)
    model.eval()
    assert relative(Engine(program, executor="reference")(x), model(x)) < 1e-4
    assert relative(block(y), model.streams[0][0](y)) < 1e-4


def test_other_hooks_are_warned_of() -> None:
    warn.cache_clear()
    model = lively(SMALL, 0)
    model.combine[3].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.warns(ParNetWarning, match=r"combine\.3 has 1 hook\(s\), which are not folded") as told:
        fold(model)
    block = model.streams[0][0]
    block.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.warns(ParNetWarning, match=r"the network has 1 hook\(s\)") as of_block:
        block.fold()  # type: ignore[operator]
    assert told[0].filename == of_block[0].filename == __file__


def test_what_computes_the_same_is_folded() -> None:
    """Parts that do nothing in evaluation mode, and networks that somebody has compiled or copied."""
    model = lively(SMALL, 0)
    digest = fold(model).digest
    model.head["dropout"] = nn.Identity()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert fold(synchronised).digest == digest
    assert isinstance(fold(torch.compile(model)), Program)  # type: ignore[arg-type]


def test_only_a_parnet_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ParNetError, match="takes a ParNet, and this is a Backbone"):
        save_checkpoint(create_model(SMALL, features_only=True), tmp_path / "c")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["parnet_cifar_1m", "parnet_fashion", "parnet_s"])
def test_a_bare_file_of_a_variant_takes_its_pictures(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = create_model(name, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    assert load_checkpoint(tmp_path / "c.pth").config == model.config
    assert not recwarn


def test_a_bare_file_of_no_variant_is_told_of(tmp_path: Path) -> None:
    torch.save(create_model(SMALL).state_dict(), tmp_path / "c.pth")
    with pytest.warns(match="no variant's.*ImageNet's, of 224 pixels") as told:
        model = load_checkpoint(tmp_path / "c.pth")
    assert told[0].filename == __file__
    save_checkpoint(model, tmp_path / "c.safetensors")
    assert load_checkpoint(tmp_path / "c.safetensors").config == model.config


@pytest.mark.parametrize("rank", [0, 1])
def test_commands_tell_it_in_a_line(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    torch.save(create_model(SMALL).state_dict(), tmp_path / "c.pth")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    read_checkpoint(tmp_path / "c.pth", argparse.Namespace(ema=False, activation=None))
    told = capsys.readouterr().err
    assert (told.count("\n"), "no variant's" in told) == ((1, True) if rank == 0 else (0, False))
    assert not recwarn
