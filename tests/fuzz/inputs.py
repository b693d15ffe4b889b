"""What people, disks and launchers feed the program, kind by kind, and what must hold for each.

A kind takes a Random, which makes the input, and a folder; it returns "taken", or "refused" where one line said why.
Whatever it raises is a defect.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from safetensors.torch import save
from torch import Tensor

from conftest import ROOT
from parallel_parnet import Config, Engine, ParNetError, Program, fold, load_checkpoint, quantize
from parallel_parnet.commands import start
from parallel_parnet.commands.ranks import Ranks
from parallel_parnet.commands.stopping import SIGNALS
from parallel_parnet.kernels.cpu import objects
from parallel_parnet.preprocess import Preprocess, find_images, read_image
from small import lively, relative

from .generators import Forged, any_value, changed, damaged, picture
from .words import OF, ONCE, OPTIONS, VARIABLES, arguments, variables

Result = TypeVar("Result")
Kind = Callable[[Random, Path], str]

SMALLEST = Config((4, 8), blocks=(1,), num_classes=3, image_size=32)
TINY = Config((4, 8, 8), blocks=(1, 1), num_classes=3, stem_strides=(2, 1), image_size=32, crop=0.5)
LIMIT_S = 30.0  # of one whole run of a command
SUFFIXES = (".png", ".jpg", ".tif", ".webp", "")
COMMANDS = ("infer.command", "plan.command", "plan.check", "bench.command", "bench.page", "depth.command",
            "export.command", "gpu.check", "gpu.tune", "gpu.compile_report", "profile.command",
            "throughput.command", "versus.command")  # fmt: skip


def told(path: Path, call: Callable[..., Result], *arguments: object) -> Result | None:
    """What a file holds; or None, where one line names the file and says why not."""
    try:
        return call(*arguments)
    except ParNetError as error:
        said = str(error)
    assert said.startswith(f"{path}: ") and said.isprintable(), said
    return None


@lru_cache(None)
def program() -> Program:
    return fold(lively(TINY, 4))


@lru_cache(None)
def quantised() -> Program:
    generator = torch.Generator("cpu").manual_seed(0)
    return quantize(program(), torch.randn((4, 3, 32, 32), generator=generator, dtype=torch.float32, device="cpu"))


@lru_cache(None)
def inputs() -> tuple[Tensor, Tensor]:
    """A picture, normalised and raw."""
    generator = torch.Generator("cpu").manual_seed(0)
    raw = torch.randint(0, 256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8, device="cpu")
    return torch.randn((1, 3, 32, 32), generator=generator, dtype=torch.float32, device="cpu"), raw


@lru_cache(None)
def engine_fields() -> dict[str, Any]:
    where = {name: [1] for name in program().by_name}
    return {"dtype": "torch.float32", "executor": "eager", "chosen": "eager", "threads": None, "cores": None,
            "placement": {"lanes": 2, "where": where, "coordinator": 0}}  # fmt: skip


@lru_cache(None)
def whole_engine() -> bytes:
    return Forged.of(program()).content({"engine": json.dumps(engine_fields())})


def a_picture(rng: Random, folder: Path) -> str:
    path = folder / f"p{rng.choice(SUFFIXES)}"
    path.write_bytes(picture(rng))
    preprocess = Preprocess.of(TINY, rng.choice((1, 8, 32)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"PIL\.")
        pixels = told(path, lambda: preprocess.pixels(read_image(path)))
    if pixels is None:
        return "refused"
    assert pixels.shape == (preprocess.size, preprocess.size, 3) and pixels.dtype == "uint8", pixels.shape
    return "taken"


def a_checkpoint(rng: Random, folder: Path) -> str:
    path = folder / f"c{rng.choice(('.safetensors', '.pth.tar', ''))}"
    kind, damage = rng.choice(("own", "bare", "released")), rng.random() < 0.5
    if damage:
        path.write_bytes(damaged(rng, _checkpoint(kind, Random(0), False), _checkpoint("released", Random(0), False)))
    else:
        path.write_bytes(_checkpoint(kind, rng, True))
    ema, activation = rng.random() < 0.2, rng.choice((None, None, "relu"))
    model = told(path, load_checkpoint, path, ema, activation)
    if model is None:
        return "refused"
    try:
        agree(fold(model))
    except ParNetError as error:
        if "non-finite" not in str(error):
            raise
        return "refused"
    return "taken"


def _checkpoint(kind: str, rng: Random, change: bool) -> bytes:
    """Bytes of a checkpoint of a kind, with one tensor, name or value changed."""
    state: dict[str, Any] = dict(_smallest())
    if kind != "released":
        state = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    config: Any = asdict(SMALLEST)
    if change and kind == "own" and rng.random() < 0.5:
        config = changed(rng, config)
    elif change:
        change_tensors(rng, state, others=kind == "released")
    if kind == "own":
        eps = changed(rng, {"head.bn": 1e-5}) if change and rng.random() < 0.3 else {}
        metadata = {"format": "parallel_parnet.checkpoint.1", "config": json.dumps(config), "eps": json.dumps(eps)}
        return save(state, metadata)
    if kind == "bare":
        return save(state)
    content: Any = {"state_dict": state, "state_dict_ema": state, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    if change and rng.random() < 0.2:
        content[rng.choice(list(content))] = any_value(rng)
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@lru_cache(None)
def _smallest() -> dict[str, Tensor]:
    return dict(lively(SMALLEST, 4).state_dict())


def change_tensors(rng: Random, tensors: dict[str, Any], others: bool) -> None:
    """One lost, added, renamed, of another shape, type or content; with `others` also what no .safetensors can hold."""
    name = rng.choice(list(tensors))
    tensor, action = tensors.pop(name), rng.randrange(12 if others else 8)
    flat = tensor.flatten()
    if action == 0:
        return
    if action == 1:
        tensors[rng.choice((f"module.{name}", f"{name}x", name.replace("0", "1", 1), "n_averaged", "é"))] = tensor
    elif action == 2:
        tensors[name] = tensor.to(rng.choice((torch.float64, torch.float16, torch.int64, torch.bool, torch.int8)))
    elif action == 3:
        filled = rng.choice((0, -1, 1e38, -1e38, 1e-40, float("nan"), float("inf")))
        tensors[name] = torch.full_like(tensor, filled, dtype=torch.float32)
    elif action == 4:
        tensors[name] = flat[: rng.randrange(len(flat) + 1)].clone()
    elif action == 5:
        tensors[name] = tensor[None].clone() if rng.random() < 0.5 else flat.clone()
    elif action == 6:
        tensors[name] = torch.cat([flat, flat])
    elif action == 7:
        tensors[name], tensors["more"] = tensor, tensor.clone()
    elif action == 8:
        tensors[name] = tensor.to_sparse() if tensor.ndim else torch.zeros((), device="meta")
    elif action == 9:
        tensors[name] = any_value(rng)
    elif action == 10:
        tensors[name] = tensor.expand(3, *tensor.shape)[0].t() if tensor.ndim == 2 else tensor.to(torch.complex64)
    else:
        tensors[rng.choice((3, None, ("a",)))] = tensor  # type: ignore[index]


def agree(made: Program) -> None:
    """The kernels, which run whatever is let through, and plain torch: for pictures of both kinds."""
    for x in inputs():
        x = x.repeat(1, 1, made.size_multiple // 32, made.size_multiple // 32)
        try:
            names = ("reference", "auto", "eager")
            expected, got, other = (Engine(made, device="cpu", executor=name)(x) for name in names)
        except ParNetError as error:  # of weights that are finite until pictures' normalisation goes into them
            if "non-finite" in str(error) and x.dtype == torch.uint8:
                continue
            raise
        assert got.isfinite().all() or not expected.isfinite().all()
        limit = 1e-5 + 4 * relative(other, expected)  # numbers that cancel are computed by nobody to the last bit
        assert not expected.isfinite().all() or relative(got, expected) < limit or got.equal(expected)


def a_programs_bytes(rng: Random, folder: Path) -> str:
    """Of its file, and an engine's: nothing is accepted but the very same."""
    path = folder / "e.safetensors"
    path.write_bytes(damaged(rng, whole_engine(), whole_engine()))
    engine = told(path, Engine.load, path, "cpu")
    assert engine is None or engine.program.digest == program().digest
    return "refused" if engine is None else "taken"


def reloaded(rng: Random, folder: Path, made: Forged, of_description: float) -> Program | None:
    """With one value of its configuration or operations changed, that often, else one tensor; its digest is right."""
    path = folder / "p.safetensors"
    if rng.random() < of_description:
        made.__dict__["description"] = changed(rng, made._description())
    else:
        change_tensors(rng, made.weights, others=False)  # type: ignore[arg-type]
    path.write_bytes(made.content({}))
    loaded = told(path, Program.load, path)
    if loaded is not None:
        loaded.save(path)
        assert Program.load(path).digest == loaded.digest
    return loaded


def a_programs_value(rng: Random, folder: Path) -> str:
    """Of a program in fp32."""
    loaded = reloaded(rng, folder, Forged.of(program()), 0.7)
    if loaded is None:
        return "refused"
    agree(loaded)
    return "taken"


def a_quantised_programs_value(rng: Random, folder: Path) -> str:
    """Of one in int8, which runs whatever its numbers are: they say no more than fp32 holds."""
    made = Forged.of(quantised())
    loaded = reloaded(rng, folder, made, 0.3)
    if loaded is None:
        return "refused"
    assert all(tensor.dtype == loaded.weights[name].dtype for name, tensor in made.weights.items())
    for executor in ("reference", "auto", "eager"):
        engine = Engine(loaded, device="cpu", executor=executor)
        x = inputs()[0].repeat(1, 1, loaded.size_multiple // 32, loaded.size_multiple // 32)
        assert engine(x).shape[0] == 1
    return "taken"


def an_engines_value(rng: Random, folder: Path) -> str:
    path, fields = folder / "e.safetensors", changed(rng, engine_fields())
    path.write_bytes(Forged.of(program()).content({"engine": json.dumps(fields)}))
    engine = told(path, Engine.load, path, "cpu")
    if engine is None:
        return "refused"
    for x in inputs():
        assert relative(engine(x), Engine(program(), device="cpu", executor="reference")(x)) < 1e-5
    return "taken"


def a_commands_arguments(rng: Random, folder: Path) -> str:
    """Read, of any command."""
    module = import_module(f"parallel_parnet.commands.{rng.choice(COMMANDS)}")
    with patch.object(sys, "argv", ["parnet", *arguments(rng)]), redirect_stdout(io.StringIO()):
        try:
            module.parse_arguments()
        except ParNetError:
            return "refused"
        except SystemExit as end:
            if end.code:
                raise
    return "taken"


def an_environment(rng: Random, folder: Path) -> str:
    """Read, by what looks into it: ranks, threads, and the choice of kernels."""
    threads = torch.get_num_threads()
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES or name == "TMPDIR"}
    with patch.dict(os.environ, {**kept, **variables(rng)}, clear=True):
        try:
            Ranks.from_environment().take_threads()
            objects.in_use.__wrapped__()
        except ParNetError:
            return "refused"
        finally:
            torch.set_num_threads(threads)
    return "taken"


def a_run(rng: Random, folder: Path) -> str:
    """Of a whole command, in a fork: files, arguments and environment together."""
    _furnish(folder)
    name = rng.choice(("infer", "infer", "plan"))
    words = [*OF[name], *arguments(rng, OPTIONS[name])]
    words[:0] = ONCE if name == "infer" and "--jsonl" not in words else ()
    environment = variables(rng) if rng.random() < 0.3 else {}
    if rng.random() < 0.3:
        (folder / "pictures" / "b.png").write_bytes(picture(rng))
    log = folder / "log"
    process = multiprocessing.get_context("fork").Process(target=_run, args=(name, words, environment, folder, log))
    process.start()
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        process.join()
    said = log.read_text(errors="replace")
    shown = f"{name} {words} {environment}: {process.exitcode}\n{said[-2000:]}"
    assert process.exitcode in (0, 1, 2), shown
    assert "Traceback" not in said and "Warning" not in said, shown
    assert process.exitcode != 2 or sum(line.startswith("error: ") for line in said.splitlines()) == 1, shown
    return "refused" if process.exitcode == 2 else "taken"


def _run(name: str, words: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(folder)
    for variable in VARIABLES:
        if variable != "TMPDIR":
            os.environ.pop(variable, None)
    os.environ.update(environment | {"HOME": str(folder)})
    sys.argv = ["parnet", *words]
    try:
        start(name)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _furnish(folder: Path) -> None:
    """What arguments name."""
    (folder / "pictures").mkdir(exist_ok=True)
    for path in folder.glob("out.*"):
        path.unlink()
    (folder / "text.png").write_text("no picture")
    (folder / "labels.txt").write_text("a\nb\nc\n")
    for device in ("full", "null"):
        (folder / device).unlink(missing_ok=True)
        (folder / device).symlink_to(f"/dev/{device}")  # so that what replaced one would replace the link
    (folder / "pictures" / "b.png").unlink(missing_ok=True)
    for name, content in _furniture().items():
        (folder / name).write_bytes(content)


@lru_cache(None)
def _furniture() -> dict[str, bytes]:
    demo = find_images([ROOT / "launch" / "demo" / "pictures"])[0].read_bytes()
    whole = {"tiny.safetensors": "own", "tiny.pth.tar": "released"}
    return {"pictures/a.png": demo} | {name: _checkpoint(kind, Random(0), False) for name, kind in whole.items()}


KINDS: dict[Kind, int] = {
    a_picture: 1500, a_checkpoint: 200, a_programs_bytes: 1600, a_programs_value: 300, an_engines_value: 200,
    a_quantised_programs_value: 100, a_commands_arguments: 600, an_environment: 485, a_run: 15,
}  # fmt: skip
"""How many of 5,000 inputs are of each kind: what is refused early is cheap, and a whole run dear."""
