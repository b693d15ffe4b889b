"""Checkpoints: what is read, and how what cannot be read is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from conftest import GOLDEN, SMALL, lively
from parallel_parnet import Config, ParNetError, load_checkpoint, save_checkpoint

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


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    for name in ("zip.pth", "raw.pth"):
        if name == "zip.pth":
            torch.save({"state_dict": Evil()}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ParNetError, match="not a whole PyTorch checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def mutated(change: str) -> dict:
    state = dict(lively(SMALL, 0).state_dict())
    kernel = "streams.1.2.block.rbr_dense.conv.weight"
    if change == "missing":
        del state[kernel]
    elif change == "missing stream":
        state = {k: v for k, v in state.items() if not k.startswith("streams.1.")}
    elif change == "foreign":
        state = {"conv1.weight": torch.randn(4, 3, 7, 7)}
    elif change == "extra":
        state["layer4.weight"] = torch.randn(3)
    elif change == "shape":
        state[kernel] = state[kernel][:, :8]
    elif change == "nan":
        state[kernel] = state[kernel] * float("nan")
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "1 tensors are missing, streams.1.2.block.rbr_dense.conv.weight"),
        ("missing stream", "streams.0, streams.1"),
        ("foreign", "not a ParNet checkpoint"),
        ("extra", "belong to no part of this network, layer4.weight"),
        ("shape", r"has shape \(16, 8, 3, 3\), expected \(16, 16, 3, 3\)"),
        ("nan", "no finite numbers"),
    ],
)
def test_weights_that_do_not_fit(change: str, message: str, tmp_path: Path) -> None:
    torch.save({"state_dict": mutated(change)}, tmp_path / "c.pth.tar")
    with pytest.raises(ParNetError, match=r"c\.pth\.tar: .*" + message):
        load_checkpoint(tmp_path / "c.pth.tar")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": [1]}, {"state_dict": {"a": 1}}])
def test_other_contents(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pth.tar")
    with pytest.raises(ParNetError, match="not a ParNet checkpoint"):
        load_checkpoint(tmp_path / "c.pth.tar")


def test_ema_that_is_not_there() -> None:
    with pytest.raises(ParNetError, match="state_dict_ema"):
        load_checkpoint(RELEASED, ema=True)


def test_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(ParNetError, match="cannot be written"):
        save_checkpoint(lively(SMALL, 0), tmp_path / "no" / "c.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ParNetError, match="cannot be written"):
        save_checkpoint(lively(SMALL, 0), tmp_path / "folder.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.safetensors"]
