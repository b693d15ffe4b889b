"""Checkpoints: what is read, and how what cannot be read is refused."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from parallel_parnet import Config, Engine, ParNet, ParNetError, create_model, fold, load_checkpoint, save_checkpoint
from parallel_parnet.files import write_atomically
from parallel_parnet.network.checkpoint import FORMAT
from small import GOLDEN, SMALL, lively, relative

RELEASED = GOLDEN / "official_narrow_relu.pth.tar"


def test_shapes_tell_the_network() -> None:
    config = load_checkpoint(RELEASED).config
    assert config == Config((8, 16, 32, 64), blocks=(4, 5, 5), num_classes=1000, activation="silu")


@pytest.mark.parametrize("config", [
    Config((8, 20), blocks=(3,), num_classes=4, stem_strides=(1, 2)),
    Config((8, 16, 24), blocks=(1, 2), stem_strides=(2, 1)),
    Config((8, 16, 32, 40, 50), blocks=(1, 1, 2, 3), num_classes=7),
], ids=lambda c: f"{c.streams}-streams")  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "module."])
def test_any_network_in_the_released_layout(config: Config, prefix: str, tmp_path: Path) -> None:
    model = lively(config, 0)
    state = {prefix + k: v for k, v in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "c.pth.tar")
    loaded = load_checkpoint(tmp_path / "c.pth.tar")
    assert loaded.config == config
    assert not loaded.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items() if v.is_floating_point())


def test_a_bare_state_dict(tmp_path: Path) -> None:
    torch.save(lively(SMALL, 0).state_dict(), tmp_path / "c.pth")
    assert load_checkpoint(tmp_path / "c.pth").config.planes == SMALL.planes


def test_own_format_keeps_everything(tmp_path: Path) -> None:
    config = Config((8, 16), (2,), num_classes=2, activation="relu", image_size=64, labels=("cat", "dog"), dropout=0.5)
    model = lively(config, 0)
    save_checkpoint(model, tmp_path / "c.safetensors")
    loaded = load_checkpoint(tmp_path / "c.safetensors")
    assert loaded.config == config
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert load_checkpoint(tmp_path / "c.safetensors", activation="silu").config.activation == "silu"
    with pytest.raises(ParNetError, match="leave ema out"):
        load_checkpoint(tmp_path / "c.safetensors", ema=True)


@pytest.mark.parametrize("kind", ["c.pth.tar", "c.safetensors"])
def test_truncated_and_foreign_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    with pytest.raises(ParNetError, match="no such checkpoint file"):
        load_checkpoint(tmp_path / ("n" * 300))
    with pytest.raises(ParNetError, match=r"c\.(pth|saf).*: no such checkpoint file"):
        load_checkpoint(path)
    if kind.endswith("safetensors"):
        save_checkpoint(lively(SMALL, 0), path)
    else:
        path.write_bytes(RELEASED.read_bytes())
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:1000], whole[: len(whole) // 2], whole[:-1], b"\0" * 5000):
        path.write_bytes(content)
        with pytest.raises(ParNetError, match=r"c\.") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


STATE = dict(lively(SMALL, 0).state_dict())
LARGE = {name: v.double() if v.is_floating_point() else v for name, v in STATE.items()}
KERNEL, VARIANCE = "streams.1.2.block.rbr_dense.conv.weight", "streams.1.0.block.rbr_1x1.bn.running_var"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
MANY, NO_NUMBER = "1000000", "9" * 5000  # a million blocks took ten minutes and 4 GB; Python makes no such number


def without(start: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in STATE.items() if not name.startswith(start)}


def with_one(name: str, value: float, state: dict[str, torch.Tensor] = STATE) -> dict[str, torch.Tensor]:
    """Whose third value in this tensor is another."""
    tensor = state[name].clone()
    tensor.view(-1)[2] = value
    return state | {name: tensor}


def of_blocks(count: str) -> tuple[dict, dict]:
    """In the package's own format."""
    return STATE, {"format": FORMAT, "config": f'{{"planes": [8, 16], "blocks": [{count}]}}'}


REFUSED: list[tuple[object, str]] = [
    *((content, "not a whole PyTorch checkpoint") for content in (
        b"", b"\x80\x02.", b"\x80\x02]a.", b"\x80\x02h\x05.", b"\x80\x02R.", b"\x80\x42K\x01.")),
    (b"<!DOCTYPE html><html>Sign in</html>", "a web page, not a checkpoint"), (LFS, "git lfs pull"),
    (lambda path: fold(lively(SMALL, 0)).save(path), r"Program\.load and Engine\.load read programs"),
    ({"model": lively(SMALL, 0)}, "holds parallel_parnet.*save the state_dict alone"),
    ({"state_dict": {"streams.0.0.block.rbr_reparam.weight": torch.zeros(1)}}, r"deploy form \(rbr_reparam\)"),
    *((content, "not a ParNet checkpoint") for content in (
        [1, 2], {"state_dict": [1]}, {"state_dict": {"a": 1}}, {"conv1.weight": torch.randn(4, 3, 7, 7)})),
    ({"state_dict": without(KERNEL)}, f"1 tensors are missing, {KERNEL}"),
    (without("streams.1."), "streams.0, streams.1"),
    (STATE | {"layer4.weight": torch.randn(3)}, "1 tensors belong to no part of this network, layer4.weight"),
    (STATE | {KERNEL: STATE[KERNEL][:, :8]}, r"has shape \(16, 8, 3, 3\), expected \(16, 16, 3, 3\)"),
    (with_one(KERNEL, torch.nan), rf"{KERNEL} holds non-finite"),
    (with_one(KERNEL, 1e39, LARGE), rf"{KERNEL} holds non-finite"),
    (with_one(VARIANCE, 1e39, LARGE), rf"{VARIANCE} holds non-finite"),  # else a silent channel
    (with_one(VARIANCE, -1e-3), rf"{VARIANCE} holds negative variances"),
    (STATE | {KERNEL: STATE[KERNEL].to_sparse()}, "is of torch.float32, torch.sparse_coo: expected floating point"),
    (STATE | {KERNEL: STATE[KERNEL].int()}, "is of torch.int32, torch.strided: expected floating point, dense"),
    (create_model(SMALL).to("meta").state_dict(), "is on the device meta, without its values"),
    (STATE | {f"streams.0.{MANY}.block": torch.ones(1)}, "tensors for 1000011 blocks"),
    (STATE | {f"streams.0.{NO_NUMBER}.block": torch.ones(1)}, "1 tensors belong to no part of this network"),
    (of_blocks(MANY), "tensors for 1000000 blocks"), (of_blocks(NO_NUMBER), "its configuration cannot be read"),
    (({}, {"format": FORMAT, "config": '{"a\\nb\\ud800": 1}'}), r"'a\\nb\\ud800'"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_what_is_refused(content: Any, message: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """In one line that names the file, and without a warning."""
    path = tmp_path / ("c.safetensors" if isinstance(content, tuple) else "c.pth.tar")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, tuple):
        save_file(content[0], path, content[1])
    elif callable(content):
        content(path)
    else:
        torch.save(content, path)
    recwarn.clear()
    with pytest.raises(ParNetError, match=rf"^\S*{path.name}: [^\n]*{message}[^\n]*$") as raised:
        load_checkpoint(path)
    assert not recwarn.list and "weights_only" not in str(raised.value)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    for name in ("zip.pth", "raw.pth"):
        if name == "zip.pth":
            torch.save({"state_dict": Evil()}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ParNetError, match=r"which loading could run|holds more than tensors"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_ema_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ParNetError, match="state_dict_ema"):
        load_checkpoint(RELEASED, ema=True)
    torch.save({"state_dict_ema": create_model(SMALL).state_dict(), "epoch": 3}, tmp_path / "averages.pth")
    with pytest.raises(ParNetError, match="no state_dict of tensors but a state_dict_ema: ask for ema"):
        load_checkpoint(tmp_path / "averages.pth")
    load_checkpoint(tmp_path / "averages.pth", ema=True)


def test_what_no_file_may_replace(tmp_path: Path) -> None:
    model, pipe, link = lively(SMALL, 0), tmp_path / "pipe", tmp_path / "link"
    link.symlink_to(tmp_path / "c.safetensors")
    save_checkpoint(model, link)
    assert link.is_symlink() and load_checkpoint(tmp_path / "c.safetensors").config == SMALL
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "told")
    assert os.read(reader, 10) == b"told" and pipe.is_fifo()
    os.close(reader)
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(ParNetError, match=r"full: cannot be written"):
        save_checkpoint(model, full)
    assert full.is_symlink() and full.is_char_device()


def test_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(ParNetError, match="cannot be written"):
        save_checkpoint(lively(SMALL, 0), tmp_path / "no" / "c.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ParNetError, match="cannot be written"):
        save_checkpoint(lively(SMALL, 0), tmp_path / "folder.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.safetensors"]


@torch.no_grad()
def test_own_format_keeps_eps(tmp_path: Path) -> None:
    model, x = lively(SMALL, 3), torch.randn(2, 3, 64, 64)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        norm.eps = (1e-3, 0.1, 1e-5)[i % 3]
    save_checkpoint(model, tmp_path / "c.safetensors")
    assert torch.equal(load_checkpoint(tmp_path / "c.safetensors")(x), model(x))
    assert relative(fold_and_run(load_checkpoint(tmp_path / "c.safetensors"), x), model(x)) < 1e-5
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for eps in ('{"inits.0.0.block.rbr_dense.bn": 0.0}', '{"inits": 1e-5}', "[]", "{", '{"inits.0": NaN}'):
        save_file(tensors, tmp_path / "w.safetensors", metadata | {"eps": eps})
        with pytest.raises(ParNetError, match=r"w\.safetensors: "):
            load_checkpoint(tmp_path / "w.safetensors")
    del metadata["eps"]
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    assert all(
        norm.eps == 1e-5 for norm in load_checkpoint(tmp_path / "old.safetensors").modules()
        if isinstance(norm, torch.nn.BatchNorm2d)
    )  # fmt: skip


@torch.no_grad()
def test_norms_that_ranks_share_are_folded_and_keep_eps(tmp_path: Path) -> None:
    model, x = lively(SMALL, 3), torch.randn(2, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 0.1
    expected = model(x)
    shared = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in shared.modules())
    assert relative(fold_and_run(shared, x), expected) < 1e-5
    save_checkpoint(shared, tmp_path / "c.safetensors")
    assert torch.equal(load_checkpoint(tmp_path / "c.safetensors")(x), expected)


@torch.no_grad()
def test_a_block_that_stands_twice_is_saved_twice(tmp_path: Path) -> None:
    model, x = lively(SMALL, 3), torch.randn(2, 3, 64, 64)
    model.streams[0][1] = model.streams[0][0]  # type: ignore[index, operator]
    save_checkpoint(model, tmp_path / "c.safetensors")
    assert torch.equal(load_checkpoint(tmp_path / "c.safetensors")(x), model(x))


def fold_and_run(model: ParNet, x: torch.Tensor) -> torch.Tensor:
    return Engine(fold(model), device="cpu", executor="reference")(x)


def planted(change: str) -> ParNet:
    """A model of which a checkpoint, or a program, would be wrong."""
    model = lively(SMALL, 0)
    block = model.streams[1][0].block
    with torch.no_grad():
        match change:
            case "a weight is NaN":
                model.head["fc"].weight[3, 5] = torch.nan
            case "a variance is negative":
                block.rbr_identity.running_var[2] = -1.0
            case "an eps is zero":
                block.rbr_identity.eps = 0.0
            case "a norm keeps no statistics":
                block.rbr_identity = torch.nn.BatchNorm2d(16, track_running_stats=False)
            case "another activation":
                block.activation = torch.relu
            case "another configuration":
                model.config = replace(model.config, activation="relu")
    return model


@pytest.mark.parametrize(("change", "message"), [
    ("a weight is NaN", r"head\.fc\.weight holds non-finite"),
    ("a variance is negative", "holds negative variances"),
    ("an eps is zero", r"eps 0\.0 of batch norm 'streams\.1\.0\.block\.rbr_identity'"),
    ("a norm keeps no statistics", "2 tensors are missing"),
    ("another activation", r"streams\.1\.0\.block has another activation"),
    ("another configuration", r"inits\.0\.0\.block has another activation"),
])  # fmt: skip
def test_what_could_not_be_loaded_is_not_saved(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ParNetError, match=rf"c\.safetensors: .*{message}"):
        save_checkpoint(planted(change), tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["another activation", "another configuration"])
def test_folding_takes_no_activation_for_another(change: str) -> None:
    with pytest.raises(ParNetError, match="has another activation"):
        fold(planted(change))


def test_weights_that_overflow_when_folded() -> None:
    model = lively(SMALL, 0)
    with torch.no_grad():
        model.streams[0][1].block.rbr_dense.conv.weight.fill_(1e38)
        model.streams[0][1].block.rbr_dense.bn.weight.fill_(1e3)
    with pytest.raises(ParNetError, match=r"streams\.0\.1\.weight holds non-finite"):
        fold(model)


def test_shapes_alone_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ParNetError, match="is on the device meta, without its values"):
        save_checkpoint(create_model(SMALL).to("meta"), tmp_path / "c.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_callers_default_type_rounds_no_weights(dtype: torch.dtype) -> None:
    expected = load_checkpoint(RELEASED).state_dict()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            loaded = load_checkpoint(RELEASED)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def trainers(state: dict) -> dict:
    return {"epoch": 3, "arch": "parnet", "state_dict": state, "args": argparse.Namespace(lr=0.1, data="here")}


WRAPPED = {
    "the trainer's own": trainers,
    "torch.compile": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "compiled in DataParallel": lambda state: {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    "in another model": lambda state: {"model": {f"backbone.{k}": v for k, v in state.items()}},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(5), **{f"module.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize(
    ("wrap", "name"),
    [*((wrap, "c.pth.tar") for wrap in WRAPPED), ("the trainer's own", "C.PTH"), ("torch.compile", "weights")],
)
def test_what_wrappers_make_of_names(wrap: str, name: str, tmp_path: Path) -> None:
    model = lively(SMALL, 1)
    torch.save(WRAPPED[wrap](dict(model.state_dict())), tmp_path / name)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path / name)(x), model(x))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
@pytest.mark.parametrize("first", [True, False])
def test_two_sets_of_weights(prefix: str, first: bool, tmp_path: Path) -> None:
    """Of which neither may be taken for the other, nor half of each."""
    state = dict(lively(SMALL, 1).state_dict())
    name = random.choice(list(state))
    wrapped, bare = {f"{prefix}{k}": v for k, v in state.items()}, {name: state[name] * 0}
    torch.save({**bare, **wrapped} if first else {**wrapped, **bare}, tmp_path / "c.pth")
    with pytest.raises(ParNetError, match=r"several networks|it has no streams\.0|lacks"):
        load_checkpoint(tmp_path / "c.pth")


def test_threads_that_load_at_the_same_time(tmp_path: Path) -> None:
    torch.save(trainers(dict(lively(SMALL, 1).state_dict())), tmp_path / "c.pth.tar")
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load_checkpoint, [tmp_path / "c.pth.tar"] * 8))
    assert all(model.config == found[0].config for model in found) and list(warnings.filters) == before


@pytest.mark.parametrize("name", ["bare.safetensors", "BARE.SAFETENSORS", "bare"])
def test_bare_safetensors(name: str, tmp_path: Path) -> None:
    model, x = lively(SMALL, 1), torch.randn(1, 3, 64, 64)
    save_file({f"module.{k}": v for k, v in model.state_dict().items()}, tmp_path / name)
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path / name)(x), model(x))
