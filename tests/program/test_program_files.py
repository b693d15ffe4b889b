"""Files of programs and engines: whatever is in them, one line that says what is wrong, or the same logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fuzz.generators import Forged
from parallel_parnet import Config, Engine, ParNetError, Program, fold
from parallel_parnet.program.families import parallel_chains
from small import SMALL, lively

PROGRAM = fold(lively(SMALL, 4))


def operation(program: Forged, name: str) -> dict[str, Any]:
    return next(op for op in program._description()["operations"] if op["name"] == name)


def set_fields(of: str, **fields: object) -> Callable[[Forged], None]:
    return lambda program: operation(program, of).update(fields)


def set_weights(**weights: Tensor | None) -> Callable[[Forged], None]:
    """Of streams.0.1, by their short names; None takes one away."""

    def change(program: Forged) -> None:
        assert isinstance(program.weights, dict)
        for short, tensor in weights.items():
            name = f"streams.0.1.{short}"
            del program.weights[name]
            if tensor is not None:
                program.weights[name] = tensor

    return change


def add_tensor(program: Forged) -> None:
    assert isinstance(program.weights, dict)
    program.weights["streams.0.weight"] = torch.zeros(1)


def drop_head(program: Forged) -> None:
    program._description()["operations"].pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_weights(bias=None), "1 tensors are missing, 'streams.0.1.bias' among them"),
        (set_weights(bias=torch.zeros(7)), r"streams.0.1.bias is \[7\] .* expected \[8\] of float32"),
        (set_weights(gate_weight=torch.zeros(8, 1)), r"gate_weight is \[8, 1\]"),
        (set_weights(scale=None), "'streams.0.1.scale' among them"),
        (set_weights(weight=torch.zeros(8, 8, 3, 3).double()), "of torch.float64"),
        (set_weights(weight=torch.full((8, 8, 3, 3), torch.nan)), "non-finite"),
        (set_weights(shift=torch.tensor([*[0.0] * 7, torch.inf])), "shift holds non-finite"),
        (add_tensor, "1 tensors belong to no operation, 'streams.0.weight' among them"),
        (drop_head, "the last operation must be a classifier"),
        (set_fields("streams.0.1", activation="selu"), "activation 'selu': choose one of silu, relu"),
        (set_fields("streams.0.1", activation="none"), "a gated convolution is 3x3"),
        (set_fields("streams.0.1", gate="gelu"), "gate 'gelu'"),
        (set_fields("streams.0.1", kind=["conv"]), r"kind \['conv'\]"),
        (set_fields("streams.0.1", shuffle=2**63), "must divide"),
        (set_fields("streams.0.1", shuffle=2), "gate identity"),
        (set_fields("streams.0.1", groups=3), "must divide"),
        (set_fields("streams.0.1", groups=True), "groups True: must be an integer"),
        (set_fields("streams.0.1", stride=1.0), "stride 1.0"),
        (set_fields("streams.0.1", stride=3), "stride 3: choose one of 1, 2"),
        (set_fields("streams.0.1", cin=16), "cin 16: its inputs have 8 channels"),
        (set_fields("streams.0.1", inputs=["nothing"]), "'nothing', which no earlier operation makes"),
        (set_fields("streams.0.1", inputs=[]), r"inputs \(\)"),
        (set_fields("streams.0.1", level=9), "stands on level 9"),
        (set_fields("streams.0.1", stream=None), "stream None in stage stream"),
        (set_fields("inits.0.0", stream=0), "stream 0 in stage stem"),
        (set_fields("streams.0.1", stream=7), r"streams \[0, 1, 2, 7\]: number them from 0"),
        (set_fields("streams.0.1", name=""), "printable characters"),
        (set_fields("streams.0.1", name="a\nb"), "printable characters"),
        (set_fields("streams.0.1", name="streams.0.0"), "appears twice"),
        (set_fields("streams.0.1", name="input"), "appears twice"),
        (set_fields("inits.0.0", groups=3), "in one group"),
        (set_fields("combine.2", groups=4), r"gate_weight is \[32, 32\]"),
        (set_fields("head.fc", cout=11), "11 logits for a configuration of 10 classes"),
        (set_fields("head.fc", activation="relu"), "a classifier has no stride"),
        (set_fields("streams.0.1", colour="red"), "not a whole program file"),
        (lambda program: program._description().update(operations={"a": 1}), "not a whole program file"),
        (lambda program: program._description().update(operations=[]), "the last operation must be"),
        (lambda program: program._description().update(outputs={"a": "x"}), "output 'a': 'x' is no operation"),
        (lambda program: program._description().update(outputs={"": "combine.3"}), "name must be of printable"),
        (lambda program: program._description().update(outputs=["a"]), "names, and the operations that make them"),
        (lambda program: program._description().update(outputs={"a": ["x"]}), "not a whole program file"),
        (lambda program: program._description().update(config=5), "not a whole program file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_program_must_be(change: Callable[[Forged], None], message: str, tmp_path: Path) -> None:
    path, program = tmp_path / "p.safetensors", Forged.of(PROGRAM)
    program.save(path)
    assert Program.load(path).digest == PROGRAM.digest
    change(program)
    program.__dict__.pop("digest")
    program.save(path)
    with pytest.raises(ParNetError, match=rf"^\S*p\.safetensors: [^\n]*{message}[^\n]*$"):
        Program.load(path)


def test_programs_made_in_python_are_held_to_the_same() -> None:
    program = parallel_chains(4, 2, 8, 32)
    for name, change in {"gate": "other", "shuffle": 2**63, "cout": 9, "stride": 2}.items():
        operations = [replace(op, **{name: change}) if op.name == "streams.0.1" else op for op in program.operations]
        with pytest.raises(ParNetError, match="operation "):
            Program(program.config, tuple(operations), program.weights)
    model = lively(SMALL, 0)
    model.inits[0][0].block.rbr_dense.bn.running_var.fill_(-1.0)  # type: ignore[index, union-attr]
    with pytest.raises(ParNetError, match=r"inits\.0\.0\..* holds non-finite"):
        fold(model)


@pytest.mark.parametrize(
    "change", [Tensor.numpy, torch.nn.Parameter, torch._neg_view], ids=["numpy", "parameter", "negative"]
)
def test_weights_made_in_python_are_plain_tensors(change: Callable[[Tensor], Any]) -> None:
    """What one executor runs another, the digest, or an export would stumble over."""
    weights = dict(PROGRAM.weights)
    weights["head.fc.bias"] = change(weights["head.fc.bias"])
    with pytest.raises(ParNetError, match=r"^head\.fc\.bias: expected a tensor on the CPU, detached"):
        replace(PROGRAM, weights=weights)


def test_weights_that_share_memory_are_saved(tmp_path: Path) -> None:
    weights = dict(PROGRAM.weights)
    weights["streams.0.1.bias"] = weights["streams.0.0.bias"]
    program = replace(PROGRAM, weights=weights)
    program.save(tmp_path / "p.safetensors")
    assert Program.load(tmp_path / "p.safetensors").digest == program.digest != PROGRAM.digest


def test_as_deep_as_one_likes() -> None:
    assert parallel_chains(1500, 1, 1, 32).size_multiple == 32, "no recursion over levels"


@pytest.mark.parametrize(
    ("old", "new"), [(b"0.875", b"0.865"), (b"silu", b"relu"), (b"auto", b"cuda"), (b"digest", b"digits"), (None, b"")]
)
def test_damage_is_told(old: bytes | None, new: bytes, tmp_path: Path) -> None:
    """In what is as good as before: configuration, operation, engine; in the digest's own name; in a weight."""
    path = tmp_path / "e.safetensors"
    Engine(PROGRAM, device="cpu").save(path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(old, new, 1) if old else whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ParNetError, match=r"e\.safetensors: damaged: its digest does not match"):
        Engine.load(path, "cpu")


def test_nested_beyond_reading(tmp_path: Path) -> None:
    path, deep = tmp_path / "e.safetensors", "[" * 100_000
    PROGRAM.save(path, {"engine": deep})
    with pytest.raises(ParNetError, match="holds no engine"):
        Engine.load(path, "cpu")
    PROGRAM.save(path, {"program": deep})
    with pytest.raises(ParNetError, match="not a whole program file"):
        Program.load(path)


def test_classes_are_those_of_the_configuration() -> None:
    config = Config(SMALL.planes, num_classes=11)
    with pytest.raises(ParNetError, match="10 logits for a configuration of 11"):
        Program(config, PROGRAM.operations, PROGRAM.weights)
