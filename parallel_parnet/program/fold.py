"""Training form to program: batch norms, branches, interleaving and shuffles disappear into weights.

Exact up to rounding, also at the borders (a batch norm before a padded convolution shifts only the taps that lie
inside the picture: the `border` weights). Worked in float64, stored in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import ParNetError
from ..network.blocks import Fusion, Pair, ParNetBlock
from ..network.features import FUSED, Backbone
from ..network.folding import CPU, affine, behind_affine, make_weights, one_kernel, to_float64
from ..network.model import ParNet, check_model, kind_of
from ..network.variants import Config
from ..settings import with_own_settings
from .program import INPUT, Operation, Program


@dataclass(frozen=True)
class _Feature:
    """A feature map while folding: `order[stored channel]` is the channel's number in the training form."""

    name: str
    order: Tensor
    level: int


@dataclass
class _Builder:
    activation: str
    operations: list[Operation] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def add(self, op: Operation, weights: dict[str, Tensor]) -> None:
        self.operations.append(op)
        for name, tensor in weights.items():
            self.weights[f"{op.name}.{name}"] = tensor.float().contiguous()

    def block(
        self,
        name: str,
        stage: str,
        stream: int | None,
        block: nn.Module,
        *inputs: _Feature,
        pair: nn.Module | None = None,
        shuffle: int = 1,
    ) -> _Feature:
        """Fold a block that reads one feature, or two through a pair."""
        assert isinstance(block, ParNetBlock) and isinstance(pair, Pair | None)
        branches, groups, cout, cin = block.block, block.groups, block.cout, block.cin // block.groups
        weight, bias = one_kernel(branches)
        gate_weight = to_float64(branches.se.weight).flatten(1)
        gate_bias = torch.zeros(cout, dtype=torch.float64, device=CPU)
        columns = _columns(groups, cin, cout, *(f.order for f in inputs))
        weight, gate_weight = _select(weight, columns), _select(gate_weight, columns)
        weights = {"bias": bias}
        identity = branches.rbr_identity
        norms = (pair.b1, pair.b2) if pair else (identity,) if identity is not None else ()
        if norms:  # gates average what left the norms; for a pair, so does the convolution
            affines = [affine(norm) for norm in norms]
            scale, shift = (
                torch.cat([v[f.order].view(groups, -1) for v, f in zip(vectors, inputs, strict=True)], 1)
                for vectors in zip(*affines, strict=True)
            )
            gate_weight, gate_bias = behind_affine(gate_weight, scale, shift)
            if pair:
                weight, weights["border"] = behind_affine(weight, scale, shift)
            else:
                weights |= {"scale": scale[0], "shift": shift[0]}
        level = 1 + max(f.level for f in inputs)
        op = Operation(
            name, "conv", stage, stream, level, tuple(f.name for f in inputs), cin * groups, cout,
            stride=block.stride, groups=groups, shuffle=shuffle,
            gate="plain" if identity is None else "identity", activation=self.activation,
        )  # fmt: skip
        self.add(op, weights | {"weight": weight, "gate_weight": gate_weight, "gate_bias": gate_bias})
        return _Feature(name, _stored_order(cout, groups, shuffle), level)


@with_own_settings
def fold(model: ParNet | Backbone, outputs: Sequence[str] | None = None) -> Program:
    """Fold a model, as it is in evaluation mode, into a program: fused convolutions and a classifier, on few levels.

    outputs: what to give by name instead of the logits alone: features, by the names in `model.feature_info`
    ("streams.0", ..., "fused"), and "logits"; of a `Backbone` its own where not given. What none needs is left out.
    The model is left as it is. For three streams with 4, 5 and 5 blocks: 22 convolutions on 11 levels, and one more.
    Hooks that make weights, as those of pruning do, are run; others are left out, and warned of.
    Raises ParNetError for another model, where a block's activation is not the configuration's, a part is none that a
    ParNet has, or weights become non-finite; for outputs that are not there or twice there, and without outputs
    for a model without a classifier.
    """
    model = getattr(model, "_orig_mod", model)  # where torch.compile keeps it
    if isinstance(model, Backbone):
        outputs = outputs or model.feature_info.module_name()
        model = model.body
    if not isinstance(model, ParNet):
        raise ParNetError(f"fold takes a ParNet or a Backbone, and this is a {kind_of(model)}")
    check_model(model)
    has_logits = model.num_classes > 0
    known = [*model.feature_info.module_name(), *(["logits"] if has_logits else [])]
    if outputs is None and not has_logits:
        raise ParNetError(f"the model has no classifier: give fold outputs, some of {', '.join(known)}")
    if outputs is not None and (isinstance(outputs, str) or not outputs or not set(outputs) <= set(known)):
        raise ParNetError(f"outputs {outputs!r}: give a tuple of some of {', '.join(known)}")
    if outputs is not None and len(set(outputs)) < len(outputs):
        raise ParNetError(f"outputs {outputs!r}: name each once")
    with torch.no_grad():
        make_weights(model)
        return _fold(model, outputs)


def _fold(model: ParNet, outputs: Sequence[str] | None) -> Program:
    config, b = model.config, _Builder(model.config.activation)
    x = _Feature(INPUT, torch.arange(3, device=CPU), 0)
    stems: dict[int, _Feature] = {}
    features = []
    for name, block in model.inits.named_modules():
        if isinstance(block, ParNetBlock):
            x = b.block(f"inits.{name}", "stem", None, block, x)
            stems[int(name.split(".")[0])] = x
    for i, stream in enumerate(model.streams):
        y = stems[i]
        for j, block in enumerate(stream.children()):
            y = b.block(f"streams.{i}.{j}", "stream", i, block, y)
        features.append(y)
    made = {f"streams.{i}": feature.name for i, feature in enumerate(features)}
    y = features[0]
    if len(features) > 1:
        y = b.block("downsamples_2.0", "fusion", None, model.downsamples_2[0], y)
        for i, fusion in enumerate(list(model.downsamples_2)[1:], start=1):
            assert isinstance(fusion, Fusion)
            # the next reader is grouped in two, so each half of its channels must lie together
            name, pair = f"downsamples_2.{i}", fusion[0]
            y = b.block(name, "fusion", None, fusion[2], features[i], y, pair=pair, shuffle=2)
        y = b.block("combine.2", "fusion", None, model.combine[2], features[-1], y, pair=model.combine[0])
    y = b.block("combine.3", "fusion", None, model.combine[3], y)
    made[FUSED] = y.name
    fc = model.head["fc"]
    if isinstance(fc, nn.Linear):
        made["logits"] = "head.fc"
        op = Operation("head.fc", "classifier", "head", None, y.level + 1, (y.name,), fc.in_features, fc.out_features)
        bias = torch.zeros(fc.out_features, dtype=torch.float64, device=CPU) if fc.bias is None else to_float64(fc.bias)
        b.add(op, {"weight": to_float64(fc.weight)[:, y.order], "bias": bias})
    elif outputs is None or "logits" in outputs:
        raise ParNetError(f"head.fc, of type {type(fc).__name__}, is no Linear: give one, or reset_classifier(0)")
    operations = sorted(b.operations, key=lambda op: op.level)
    if outputs is None:
        return Program(config, tuple(operations), b.weights)
    return _pruned(config, operations, b.weights, {name: made[name] for name in outputs})


def _pruned(
    config: Config, operations: Sequence[Operation], weights: Mapping[str, Tensor], outputs: Mapping[str, str]
) -> Program:
    """What the outputs need, its streams numbered from 0."""
    needed = set(outputs.values())
    for op in reversed(operations):
        needed |= set(op.inputs) if op.name in needed else set()
    kept = [op for op in operations if op.name in needed]
    numbers = {stream: i for i, stream in enumerate(sorted({op.stream for op in kept if op.stream is not None}))}
    kept = [op if op.stream is None else replace(op, stream=numbers[op.stream]) for op in kept]
    own = {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] in needed}
    return Program(config, tuple(kept), own, outputs)


def _columns(groups: int, cin: int, cout: int, *orders: Tensor) -> Tensor:
    """Which input column of the trained kernel each stored input channel multiplies, [cout, cin / groups].

    Two inputs were interleaved a0, b0, a1, b1, ... before being cut into groups; each group now reads its part of a,
    then its part of b, both in the order in which they are stored.
    """
    parts = []
    for i, order in enumerate(orders):
        part = order.view(groups, -1)
        first = torch.arange(groups, device=CPU)[:, None] * part.shape[1]
        part = part - first
        assert part.min() >= 0 and part.max() < part.shape[1], "a group's channels must be stored together"
        parts.append(part * len(orders) + i)
    columns = torch.cat(parts, 1)
    assert columns.shape == (groups, cin)
    return columns.repeat_interleave(cout // groups, 0)


def _select(weight: Tensor, columns: Tensor) -> Tensor:
    """Reorder the input columns of each row of a kernel [cout, cin, ...]."""
    return weight[torch.arange(len(weight), device=CPU)[:, None], columns]


def _stored_order(cout: int, groups: int, shuffle: int) -> Tensor:
    """The training form's channels, in stored order: it shuffles channel j of group g to place j * groups + g."""
    computed = torch.arange(cout, device=CPU).view(-1, groups).T  # [groups, cout / groups]
    return computed.reshape(groups, shuffle, -1).transpose(0, 1).flatten()
