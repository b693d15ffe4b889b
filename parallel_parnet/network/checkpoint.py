"""Checkpoint files to models: the released .pth.tar layout, and the project's own .safetensors.

A released file holds `state_dict` and perhaps `state_dict_ema`, names with or without a wrapper's in front. The layers
follow from names and shapes: a 1x1 branch behind a pooling layer is called `rbr_1x1.1`, so even strides can be read.
What pictures they take, and dropout, are those of the variant with such layers; of any other network ImageNet's, which
is warned of. (The paper says SiLU; the released evaluation code runs ReLU by accident of its configuration, so the
activation is the caller's choice.)
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm  # SyncBatchNorm is one, and no BatchNorm2d

from ..errors import ParNetError, ParNetWarning
from ..files import open_safetensors, write_safetensors
from ..settings import Together, quiet, with_own_settings
from .model import ParNet, check_model, kind_of
from .variants import VARIANTS, Config

FORMAT = "parallel_parnet.checkpoint.1"
with_arguments = Together(lambda: torch.serialization.safe_globals([argparse.Namespace]))  # mere data


@with_own_settings
def load_checkpoint(path: Path | str, ema: bool = False, activation: str | None = None) -> ParNet:
    """Load a model, in evaluation mode, with the weights, widths, block counts and classes of the file.

    ema: take the moving average of the weights, which a released file may carry beside the plain ones.
    activation: "silu" or "relu"; not given, what the file says (.safetensors) or SiLU (.pth.tar).
    Warns (ParNetWarning) where the file does not say which pictures the network takes, and it is no variant.
    Raises ParNetError, naming the file, where it is missing, truncated, foreign, or does not fit together.
    """
    path = Path(path)
    if not os.path.isfile(path):  # a Path's own is_file raises for names that are too long, or not to be looked up
        what = "a folder, not a" if os.path.isdir(path) else "not a regular" if os.path.exists(path) else "no such"
        raise ParNetError(f"{path}: {what} checkpoint file")
    try:
        if _is_safetensors(path):
            if ema:
                raise ParNetError("a .safetensors file holds one set of weights: leave ema out")
            config, epsilons, state = _read_safetensors(path)
        else:
            config, epsilons, state = None, {}, _read_released(path, ema)
        told = config is not None
        config = config or _taking_pictures(infer_config(state))
        if activation is not None:
            config = replace(config, activation=activation)
        model = _assembled(config, epsilons, state)
    except ParNetError as error:
        raise ParNetError(f"{path}: {error}") from None
    if not told and _variant_of(config) is None:
        words = (
            f"{path}: widths {config.planes} are no variant's, and the file does not say which pictures they take: "
            f"ImageNet's, of {config.image_size} pixels, unless model.config is set, and saved by save_checkpoint"
        )
        warnings.warn(words, ParNetWarning, stacklevel=3)
    return model


@with_own_settings
def save_checkpoint(model: ParNet, path: Path | str) -> None:
    """Write weights, each batch norm's eps and configuration as .safetensors, atomically.

    Raises ParNetError where the file could not be loaded, would be another model's, or cannot be written.
    """
    if not isinstance(model, ParNet):
        raise ParNetError(f"save_checkpoint takes a ParNet, and this is a {kind_of(model)}")
    own = {k: v.detach() for k, v in model.state_dict().items() if v.is_floating_point()}
    # copied, since safetensors refuses tensors that share memory, as those of a block that stands twice do
    state = {
        k: v.to("meta" if v.is_meta else "cpu").clone(memory_format=torch.contiguous_format) for k, v in own.items()
    }
    epsilons = {name: norm.eps for name, norm in _norms(model).items()}
    try:
        check_model(model)
        _assembled(model.config, epsilons, state)
    except ParNetError as error:
        raise ParNetError(f"{path}: {error}") from None
    metadata = {"format": FORMAT, "config": json.dumps(asdict(model.config)), "eps": json.dumps(epsilons)}
    write_safetensors(path, state, metadata)


def _assembled(config: Config, epsilons: Mapping[str, float], state: Mapping[str, Tensor]) -> ParNet:
    if sum(config.blocks) > len(state):  # making blocks that no tensor is for could take hours, and the memory
        raise ParNetError(f"{len(state)} tensors for {sum(config.blocks)} blocks in its streams")
    with torch.device("meta"):  # nothing to initialise, and no default type: the tensors of the file take its place
        model = ParNet(config)
    _load(model, state)
    _set_epsilons(model, epsilons)
    return model.eval()


def _norms(model: ParNet) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _set_epsilons(model: ParNet, epsilons: Mapping[str, float]) -> None:
    """Set what batch norms add to a variance; those that the file does not name keep torch's default."""
    norms = _norms(model)
    for name, eps in epsilons.items():
        if name not in norms or not isinstance(eps, float) or not 0 < eps < 1:
            raise ParNetError(f"eps {eps!r} of batch norm {name!r}: give one in 0..1 to a norm that the network has")
        norms[name].eps = eps


def _is_safetensors(path: Path) -> bool:
    """Tell by the suffix, or else by the content. ParNetError for what people download in place of a checkpoint."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ParNetError(f"cannot be read ({error.strerror})") from None
    if head.startswith(b"version https://git-lfs"):
        raise ParNetError("a pointer of Git LFS, not the file that it stands for: git lfs pull fetches that")
    if head.lstrip()[:1] == b"<":
        raise ParNetError("a web page, not a checkpoint: download the file itself")
    return path.suffix.lower() == ".safetensors" or head[8:9] == b"{"


def _read_safetensors(path: Path) -> tuple[Config | None, dict[str, float], dict[str, Tensor]]:
    """Read configuration, eps by norm, and tensors. Files of others lack the configuration: the network follows from
    names and shapes, as a released file's does."""
    try:
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ParNetError(f"not a whole .safetensors file ({error})") from None
    made_by = metadata.get("format", "")
    if not made_by.startswith("parallel_parnet."):
        return None, {}, _named_as_released(state)
    if made_by != FORMAT:
        raise ParNetError(f"a file of format {made_by}, not {FORMAT}; Program.load and Engine.load read programs")
    try:
        config, epsilons = Config.of(json.loads(metadata["config"])), json.loads(metadata.get("eps", "{}"))
    except ParNetError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ParNetError(f"its configuration cannot be read ({error})") from None
    if not isinstance(epsilons, dict):
        raise ParNetError("its eps is no object of batch norms and numbers")
    return config, epsilons, state


def _read_released(path: Path, ema: bool) -> dict[str, Tensor]:
    try:
        with with_arguments, quiet:  # torch warns of pickles that damage made strange
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever damage leads it to
        if foreign := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise ParNetError(
                f"holds {foreign[1]}, which loading could run: save the state_dict alone, with torch.save"
            ) from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # whose own words advise to load what could run
            reason = "its pickle is damaged, or holds more than tensors"
        raise ParNetError(f"not a whole PyTorch checkpoint ({reason})") from None
    if not isinstance(content, Mapping):
        raise ParNetError("not a ParNet checkpoint: it holds no dictionary")
    if ema and "state_dict_ema" not in content:
        raise ParNetError("holds no EMA weights (state_dict_ema): leave ema out")
    keys = ("state_dict_ema",) if ema else ("state_dict", "model_state_dict", "model")
    state = next((content[key] for key in keys if key in content), content)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        other = " but a state_dict_ema: ask for ema" if "state_dict_ema" in content else ""
        raise ParNetError(f"not a ParNet checkpoint: it holds no state_dict of tensors{other}")
    return _named_as_released({str(name): tensor for name, tensor in state.items()})


def _named_as_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers put in front of names or beside them (DataParallel, torch.compile, AveragedModel)."""
    names = {name: name.replace("_orig_mod.", "") for name in state if name != "n_averaged"}
    if any("rbr_reparam" in name for name in names):
        raise ParNetError("weights in deploy form (rbr_reparam), folded already: give those in training form")
    head = "head.fc.weight"
    prefix = next((bare for bare in names.values() if bare.endswith(head)), head).removesuffix(head)
    found = {bare.removeprefix(prefix): state[name] for name, bare in names.items()}
    if len(found) < len(names):
        raise ParNetError("weights of several networks, whose names differ by a wrapper's prefix alone: give one's")
    return found


def infer_config(state: Mapping[str, Tensor]) -> Config:
    """Infer widths, block counts, strides and classes from the names and shapes of a released state_dict. ParNetError
    where it is no ParNet's."""

    def rows(name: str) -> int:
        if name not in state or state[name].ndim == 0:
            raise ParNetError(f"not a ParNet checkpoint: it lacks {name}")
        return state[name].shape[0]

    places = [re.match(r"streams\.(\d{1,9})\.(\d{1,9})\.", name) for name in state]
    counts: dict[int, int] = {}
    for stream, block in (map(int, place.groups()) for place in places if place):
        counts[stream] = max(counts.get(stream, 0), block + 1)
    if sorted(counts) != list(range(len(counts))) or not counts:
        raise ParNetError("not a ParNet checkpoint: it has no streams.0, streams.1, ...")
    dense = "block.rbr_dense.conv.weight"
    planes = [rows(f"streams.{i}.0.{dense}") for i in range(len(counts))] + [rows(f"combine.3.{dense}")]
    first, second = (2 if any(n.startswith(f"inits.0.{i}.block.rbr_1x1.1.") for n in state) else 1 for i in (0, 1))
    return Config(
        planes=tuple(planes),
        blocks=tuple(counts[i] for i in range(len(counts))),
        num_classes=rows("head.fc.weight"),
        stem_strides=(first, second),
    )


def _variant_of(config: Config) -> Config | None:
    """Find the variant that has the same layers."""
    layers = ("planes", "blocks", "stem_strides")
    same = (v for v in VARIANTS.values() if all(getattr(v, name) == getattr(config, name) for name in layers))
    return next(same, None)


def _taking_pictures(config: Config) -> Config:
    """Take pictures and dropout from the variant with these layers, if there is one."""
    return replace(_variant_of(config) or config, num_classes=config.num_classes, labels=())


def _load(model: ParNet, state: Mapping[str, Tensor]) -> None:
    own, weights = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}, {}
    if missing := sorted(own.keys() - state.keys()):
        raise ParNetError(f"{len(missing)} tensors are missing, {missing[0]} among them")
    if extra := sorted(k for k in state.keys() - own.keys() if not k.endswith("num_batches_tracked")):
        raise ParNetError(f"{len(extra)} tensors belong to no part of this network, {extra[0]} among them")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ParNetError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
        if not state[name].is_floating_point() or state[name].layout != torch.strided:
            raise ParNetError(f"{name} is of {state[name].dtype}, {state[name].layout}: expected floating point, dense")
        if state[name].is_meta:
            raise ParNetError(f"{name} is on the device meta, without its values")
        weights[name] = state[name].to("cpu", torch.float32, copy=True)
        if not torch.isfinite(weights[name]).all():
            raise ParNetError(f"{name} holds non-finite values in float32 (NaN or inf)")
        if name.endswith("running_var") and (weights[name] < 0).any():
            raise ParNetError(f"{name} holds negative variances")
    counts = {k: torch.zeros((), dtype=torch.int64, device="cpu") for k in model.state_dict().keys() - own.keys()}
    model.load_state_dict(weights | counts, assign=True)
