"""Files of programs and engines: whatever is in them, one line that says what is wrong, or the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import SMALL, lively, relative
from parallel_parnet import Config, Engine, ParNetError, Program, fold
from parallel_parnet.program.families import arranged

PROGRAM = fold(lively(SMALL, 4))
X = torch.randn(1, 3, 32, 32)
EXPECTED = Engine(PROGRAM, device="cpu", executor="reference")(X)
ENGINE = {
    "dtype": "torch.float32", "executor": "eager", "chosen": "eager", "threads": None, "cores": None,
    "placement": {"lanes": 2, "where": {name: [1] for name in PROGRAM.by_name}, "coordinator": 0},
}  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.integers(-2, 70) | st.floats() | st.text(max_size=5)
    | st.sampled_from(("conv", "silu", "relu", "none", "plain", "head", "input", "inits.0.0", "native")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Forged(Program):
    """Checked by nobody, and described as its maker likes: its file has a digest that is right."""

    def __post_init__(self, original: None) -> None:
        self.__dict__["description"] = {"config": asdict(self.config), "operations": list(map(asdict, self.operations))}

    def _description(self) -> dict:
        return self.__dict__["description"]


def forged() -> Forged:
    return Forged(PROGRAM.config, PROGRAM.operations, dict(PROGRAM.weights))


Loaded = TypeVar("Loaded")


def loaded_or_told(load: Callable[..., Loaded], path: Path, *arguments: object) -> Loaded | None:
    """What a file holds; or None, where one line names the file and says why not."""
    try:
        return load(path, *arguments)
    except ParNetError as error:
        said = str(error)
    assert said.startswith(f"{path}: ") and "\n" not in said
    return None


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
        (set_weights(weight=torch.full((8, 8, 3, 3), torch.nan)), "no finite numbers"),
        (set_weights(shift=torch.tensor([*[0.0] * 7, torch.inf])), "shift holds values that are no finite"),
        (add_tensor, "1 tensors belong to no operation, 'streams.0.weight' among them"),
        (drop_head, "the last operation must be a classifier"),
        (set_fields("streams.0.1", activation="selu"), "activation 'selu': choose one of silu, relu"),
        (set_fields("streams.0.1", activation="none"), "a convolution has both"),
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
        (lambda program: program._description().update(config=5), "not a whole program file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_program_must_be(change: Callable[[Forged], None], message: str, tmp_path: Path) -> None:
    path, program = tmp_path / "p.safetensors", forged()
    program.save(path)
    assert Program.load(path).digest == PROGRAM.digest
    change(program)
    program.__dict__.pop("digest")
    program.save(path)
    with pytest.raises(ParNetError, match=rf"^\S*p\.safetensors: [^\n]*{message}[^\n]*$"):
        Program.load(path)


def test_programs_made_in_python_are_held_to_the_same() -> None:
    program = arranged(4, 2, 8, 32)
    for name, change in {"gate": "other", "shuffle": 2**63, "cout": 9, "stride": 2}.items():
        operations = [replace(op, **{name: change}) if op.name == "streams.0.1" else op for op in program.operations]
        with pytest.raises(ParNetError, match="operation "):
            Program(program.config, tuple(operations), program.weights)
    model = lively(SMALL, 0)
    model.inits[0][0].block.rbr_dense.bn.running_var.fill_(-1.0)  # type: ignore[index, union-attr]
    with pytest.raises(ParNetError, match=r"inits\.0\.0\..* holds values that are no finite"):
        fold(model)


def test_as_deep_as_one_likes() -> None:
    assert arranged(1500, 1, 1, 32).size_multiple == 32, "no recursion over levels"


@pytest.mark.parametrize(
    ("old", "new"), [(b"0.875", b"0.865"), (b"silu", b"relu"), (b"cpu", b"gpu"), (b"digest", b"digits"), (None, b"")]
)
def test_damage_is_told(old: bytes | None, new: bytes, tmp_path: Path) -> None:
    """In what is as good as before: configuration, operation, engine; in the digest's own name; in a weight."""
    path = tmp_path / "e.safetensors"
    Engine(PROGRAM, device="cpu", executor="cpu").save(path)
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


@many
@given(data=st.data())
def test_any_damage_to_the_bytes(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    PROGRAM.save(path, {"engine": json.dumps(ENGINE)})
    content = bytearray(path.read_bytes())
    head = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):  # half of them in the header, which is the smaller part
        place = data.draw(st.integers(0, head - 1) | st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    if engine := loaded_or_told(Engine.load, path, "cpu"):
        assert engine.program.digest == PROGRAM.digest


@many
@given(data=st.data())
def test_any_value_in_an_operation(data: st.DataObject, tmp_path: Path) -> None:
    """With a digest that is right: the kernels run whatever is let through, and agree with plain torch."""
    path, program = tmp_path / "p.safetensors", forged()
    op = operation(program, data.draw(st.sampled_from(list(PROGRAM.by_name))))
    op[data.draw(st.sampled_from(list(op)))] = data.draw(json_values)
    program.save(path)
    if loaded := loaded_or_told(Program.load, path):
        expected = Engine(loaded, device="cpu", executor="reference")(X)
        assert relative(Engine(loaded, device="cpu")(X), expected) < 1e-5


@many
@given(data=st.data())
def test_any_value_in_an_engine(data: st.DataObject, tmp_path: Path) -> None:
    path, saved = tmp_path / "e.safetensors", json.loads(json.dumps(ENGINE))
    holder = data.draw(st.sampled_from((saved, saved["placement"], saved["placement"]["where"])))
    holder[data.draw(st.sampled_from(list(holder)) | st.text(max_size=3))] = data.draw(json_values)
    PROGRAM.save(path, {"engine": data.draw(st.just(json.dumps(saved)) | json_values.map(json.dumps))})
    if engine := loaded_or_told(Engine.load, path, "cpu"):
        assert relative(engine(X), EXPECTED) < 1e-5


def test_classes_are_those_of_the_configuration() -> None:
    config = Config(SMALL.planes, num_classes=11)
    with pytest.raises(ParNetError, match="10 logits for a configuration of 11"):
        Program(config, PROGRAM.operations, PROGRAM.weights)
