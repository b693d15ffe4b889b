"""Training: what it learns, what it goes on from after a kill, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from conftest import ROOT, launch
from forked import start_script
from labelled import cifar_binary, colours, mnist
from parallel_parnet import ParNetError, load_checkpoint
from parallel_parnet.commands.data.finding import open_split
from parallel_parnet.commands.data.split import TEST, TRAIN
from parallel_parnet.commands.locking import held
from parallel_parnet.commands.ranks import Ranks
from parallel_parnet.commands.train import command, state
from parallel_parnet.commands.train import recipe as recipes
from parallel_parnet.commands.train.batches import Pictures
from parallel_parnet.commands.train.command import settings_of
from parallel_parnet.commands.train.loop import Training
from parallel_parnet.commands.train.made_up import draw
from parallel_parnet.commands.train.network import check_same_classes, fresh
from parallel_parnet.commands.train.recipe import Recipe
from parallel_parnet.preprocess import Preprocess
from processes import children_of, free_port
from small import GOLDEN

CHECKPOINT = ROOT / "launch" / "demo" / "parnet_fashion.safetensors"
ALONE, CPU = Ranks(0, 1, 0, 1), torch.device("cpu")


def training(folder: Path, model: str, recipe: Recipe, test: str = TEST) -> Training:
    torch.manual_seed(0)
    split = open_split(folder, TRAIN)
    network, numbers, _ = fresh(model, None, None, split)
    preprocess = Preprocess.of(network.config)
    sides = (Pictures(part, numbers, preprocess) for part in (split, open_split(folder, test)))
    return Training(network, recipe, *sides, ALONE, CPU, 0)


def settings(task: Training) -> str:
    """Those of a command that was given no options, which are kept beside a task's state."""
    return settings_of(Namespace(seed=0, checkpoint=None, ema=False), task)


def run(task: Training, every: int = 1000, keep=lambda: None) -> Training:
    task.run(keep, every, Console(quiet=True))
    return task


@pytest.mark.parametrize(
    ("model", "epochs"), [("parnet_cifar_1m", 2), ("parnet_cifar_15m", 1), ("parnet_cifar_35m", 1)]
)
def test_cifar_sizes_train(model: str, epochs: int, tmp_path: Path) -> None:
    cifar_binary(tmp_path / "data", 1)
    recipe = recipes.load(recipes.default(model)).with_changes(epochs=epochs, batch_size=5)
    task = run(training(tmp_path / "data", model, recipe))
    assert [row["epoch"] for row in task.log] == [1, 2][:epochs] and all(0 < row["loss"] < 10 for row in task.log)
    assert task.result.config.labels == tuple(f"kind {i}" for i in range(10))


def test_32_pictures_are_learnt_by_heart(tmp_path: Path) -> None:
    mnist(tmp_path / "data", 32, 1)
    recipe = recipes.load("fashion").with_changes(epochs=12, batch_size=8, ema=0.9, mirror=False, shift=0)
    assert run(training(tmp_path / "data", "parnet_fashion", recipe, TRAIN)).log[-1]["test_accuracy"] == 1.0


def test_the_average_of_a_short_run_has_learnt_what_its_network_has(tmp_path: Path) -> None:
    """By 72 steps of a recipe that averages over 500. A run that goes on has as many steps behind it."""
    recipe = recipes.load("fashion").with_changes(epochs=6, batch_size=8)
    task = run(training(colours(tmp_path, {"train": 32, "val": 5}), "parnet_fashion", recipe))
    assert task.log[-1]["test_accuracy"] == 1.0 and task.average.n_averaged == 72
    again = training(tmp_path, "parnet_fashion", recipe)
    again.restore(task.state())
    before, after = (copy.deepcopy(model.head["fc"].weight) for model in (again.result, again.model))
    with torch.no_grad():
        again.model.head["fc"].weight += 1
    again.average.update_parameters(again.model)
    moved = before + (after + 1 - before) * 9 / 82
    assert torch.allclose(again.result.head["fc"].weight, moved, atol=1e-6)


EVERYTHING = recipes.load("imagenet").with_changes(epochs=2, batch_size=4, lr=0.05, ema=0.9, amp="bfloat16")


@pytest.mark.parametrize("name", ["fashion", "everything"])
def test_a_state_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """Also in the middle of an epoch, and with all that a recipe may ask for."""
    mnist(tmp_path / "data", 16, 4)
    recipe = EVERYTHING if name == "everything" else recipes.load("fashion").with_changes(epochs=2, batch_size=4)
    task = training(tmp_path / "data", "parnet_fashion", recipe)
    states: list[bytes] = []

    def keep() -> None:
        torch.save(task.state(), tmp_path / "state")
        states.append((tmp_path / "state").read_bytes())

    run(task, 3, keep)
    assert len(states) == 4
    (tmp_path / "state").write_bytes(states[2])  # after three of the second epoch's four steps
    again = training(tmp_path / "data", "parnet_fashion", recipe)
    again.restore(torch.load(tmp_path / "state", weights_only=True))
    assert (again.epoch, again.step) == (2, 3)
    run(again)
    assert again.log == task.log
    pairs = zip(task.result.state_dict().values(), again.result.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def killed(words: list[str], torchrun: list[str], state: Path) -> int | None:
    """Start train.py, and SIGKILL it, or the first process that torchrun started, once it keeps a state; the status
    that all ends with."""
    environment, said = {**os.environ, "OMP_NUM_THREADS": "1"}, (state.with_name("stdout"), state.with_name("stderr"))
    process = start_script(ROOT / "launch" / "train.py", words, torchrun, ROOT, environment, said)
    until = time.monotonic() + 60
    while not state.exists() and time.monotonic() < until:
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(children_of(process.pid)[0] if torchrun else process.pid, signal.SIGKILL)
    process.join(120)
    return process.exitcode


OPTIONS = ("--epochs", 2, "-b", 4, "--save-steps", 1, "--device", "cpu", "--out")


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    data, out = mnist(tmp_path / "data", 32, 4), tmp_path / "cut.safetensors"
    words = [str(word) for word in (data, *OPTIONS, out, "--curve", tmp_path / "c")]
    state = out.with_name("cut.safetensors.state")
    assert killed(words, [], state) == -signal.SIGKILL
    assert state.exists() and not out.exists()
    resumed = launch("train.py", *words)
    assert "going on with epoch" in resumed.stdout
    assert [json.loads(line)["epoch"] for line in (tmp_path / "c.jsonl").read_text().splitlines()] == [1, 2]
    assert Image.open(tmp_path / "c.png").width > 500
    torch.set_num_threads(1)
    recipe = recipes.load("fashion").with_changes(epochs=2, batch_size=4)
    whole = run(training(data, "parnet_fashion", recipe)).result.state_dict()
    assert not state.exists() and all(torch.equal(whole[key], tensor) for key, tensor in load_file(out).items())


def test_a_second_run_of_the_same_name_is_refused(tmp_path: Path, here: Callable) -> None:
    """While there is another; what one left that was killed is none."""
    data, out = mnist(tmp_path / "data", 8, 2), tmp_path / "o.safetensors"
    words = ("train", data, "--out", out, "--epochs", 1, "-b", 4, "--device", "cpu")
    with held(state.beside(out)):
        run = here(*words)
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and not out.exists()
        assert f"{state.beside(out)}: another run is writing it; wait for it, or give another file" in run.stderr
    out.with_name("o.safetensors.state.lock").touch()
    assert here(*words).returncode == 0 and {path.name for path in tmp_path.iterdir()} == {"data", out.name}


def test_a_run_that_was_killed_before_it_told_of_its_last_epoch(tmp_path: Path) -> None:
    """Its state was kept just before. The names in the figure are neither a formula nor, one of them, text."""
    data, out = mnist(tmp_path / os.fsdecode(b"$a_$\xff"), 8, 2), tmp_path / "o.safetensors"
    task = run(training(data, "parnet_fashion", recipes.load("fashion").with_changes(epochs=1, batch_size=4)))
    state.write(state.beside(out), task.state() | {"settings": settings(task)})
    files = ("--log", tmp_path / "log.json", "--curve", tmp_path / "c")
    resumed = launch("train.py", data, "--epochs", 1, "-b", 4, "--device", "cpu", "--out", out, *files)
    assert "going on with epoch 2" in resumed.stdout
    assert json.loads((tmp_path / "log.json").read_text())["epochs"] == task.log
    assert Image.open(tmp_path / "c.png").width > 500 and len((tmp_path / "c.jsonl").read_text().splitlines()) == 1


@pytest.mark.ranks
def test_ranks_of_which_one_is_killed_go_on_to_the_same_bits(tmp_path: Path) -> None:
    data, whole, cut = mnist(tmp_path / "data", 24, 4), tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    launch("train.py", data, *OPTIONS, whole, ranks=2)
    torchrun = ["--nproc-per-node=2", "--max-restarts=1", f"--master-port={free_port()}"]
    assert killed([*map(str, (data, *OPTIONS, cut))], torchrun, cut.with_name("cut.safetensors.state")) == 0
    first, second = load_file(whole), load_file(cut)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_folder_with_a_picture_that_cannot_be_read(tmp_path: Path) -> None:
    draw(tmp_path / "shapes", {"train": 3, "val": 1})
    for part in ("train", "val"):  # the same name in both
        (tmp_path / "shapes" / part / "disc" / "000.png").write_text("no picture")
    out = tmp_path / "out.safetensors"
    run = launch("train.py", tmp_path / "shapes", "--checkpoint", CHECKPOINT, "--out", out, "--epochs", 1, "-b", 9)
    assert run.stdout.count("000.png: not a picture") == 2 and "of 2 test pictures right; skipped" in run.stdout
    assert "skipped 1 of 3 test and 1 of 9 training pictures" in run.stdout
    assert load_checkpoint(out).config.labels == ("disc", "square", "triangle")


@pytest.mark.ranks
def test_pictures_that_only_another_rank_cannot_read(tmp_path: Path) -> None:
    """Rank 0 tells of them; no rank ends as if lost, for which torchrun would begin the whole training again."""
    draw(tmp_path / "shapes", {"train": 4, "val": 2})
    (tmp_path / "shapes" / "val" / "disc" / "001.png").write_text("no picture")  # the second, so rank 1's
    options = ("--checkpoint", CHECKPOINT, "--epochs", 1, "-b", 2, "--out", tmp_path / "out.safetensors")
    run = launch("train.py", tmp_path / "shapes", *options, ranks=2)
    assert "disc/001.png: not a picture" in run.stdout and "of 5 test pictures right; skipped 1 of 6 test" in run.stdout


@pytest.mark.parametrize(("left", "said"), [(0, "none of 3"), (1, "1 of 3")])
def test_a_step_of_pictures_that_cannot_be_read(left: int, said: str, tmp_path: Path) -> None:
    """Batch norm takes no picture alone, where a feature is one pixel."""
    draw(tmp_path, {"train": 1, "val": 1})
    for path in sorted((tmp_path / "train").rglob("*.png"))[left:]:
        path.write_text("no picture")
    task = training(tmp_path, "parnet_fashion", recipes.load("fashion").with_changes(epochs=1, batch_size=3))
    with pytest.raises(ParNetError, match=rf"{said} pictures can be read, and a step takes two or more; .*a picture"):
        run(task)


def test_pictures_that_cannot_be_read_while_testing(tmp_path: Path) -> None:
    """One alone in its batch is skipped; nothing is said of the accuracy where there is no other."""
    draw(tmp_path, {"train": 2, "val": 1})
    recipe = recipes.load("fashion").with_changes(epochs=1, batch_size=2)
    last, *others = sorted((tmp_path / "val").rglob("*.png"), reverse=True)
    last.write_text("no picture")
    task = run(training(tmp_path, "parnet_fashion", recipe))
    assert len(task.log) == 1 and list(task.test.skipped) == ["triangle/000.png"]
    again = training(tmp_path, "parnet_fashion", recipe)
    again.restore(task.state())
    assert again.skipped() == task.skipped(), "a run that goes on tells of them at its end"
    for path in others:
        path.write_text("no picture")
    with pytest.raises(ParNetError, match=r"none of 3 pictures to test on can be read; .*000\.png: not a picture"):
        run(training(tmp_path, "parnet_fashion", recipe))


def test_a_run_goes_on_on_the_same_kind_of_device(tmp_path: Path) -> None:
    task = training(mnist(tmp_path / "data", 4, 2), "parnet_fashion", EVERYTHING)
    on_cpu = settings(task)
    state.write(tmp_path / "c.state", task.state() | {"settings": on_cpu})
    assert state.read(tmp_path / "c.state", on_cpu)
    task.device = torch.device("cuda")
    with pytest.raises(ParNetError, match="on another kind of device, stopped here; give those, or remove it"):
        state.read(tmp_path / "c.state", settings(task))


def test_a_run_goes_on_with_the_same_pictures(tmp_path: Path) -> None:
    """Of as many, in as many classes, two may have changed places."""
    draw(tmp_path, {"train": 2, "val": 1})
    recipe = recipes.load("fashion").with_changes(epochs=1, batch_size=2)
    before = settings(training(tmp_path, "parnet_fashion", recipe))
    assert before == settings(training(tmp_path, "parnet_fashion", recipe))
    disc, square = (tmp_path / "train" / name / "001.png" for name in ("disc", "square"))
    disc.rename(square.with_name("from-disc.png"))
    square.rename(disc.with_name("from-square.png"))
    assert before != settings(training(tmp_path, "parnet_fashion", recipe))


def test_a_run_goes_on_with_the_same_settings(tmp_path: Path) -> None:
    task = training(mnist(tmp_path / "data", 4, 2), "parnet_fashion", EVERYTHING)
    given = {"seed": 0, "checkpoint": None, "ema": False}
    others = ({"seed": 1}, {"checkpoint": Path("a.pth.tar")}, {"ema": True})
    kept = {settings_of(Namespace(**given | other), task) for other in ({}, *others)}
    task.recipe = EVERYTHING.with_changes(lr=0.06)
    kept.add(settings(task))
    task.ranks = Ranks(0, 2, 0, 2)
    assert len(kept | {settings(task)}) == 6


def test_options_take_the_place_of_the_recipe_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--epochs", 3, "-b", 5, "--lr", 0.7, "--weight-decay", 0.6, "--label-smoothing", 0.5)
    out = ("--out", tmp_path / "o.safetensors", "--model", "parnet_s")
    monkeypatch.setattr(sys, "argv", ["train", "data", *map(str, (*out, *words))])
    args, recipe = command.parse_arguments(), recipes.load("imagenet")
    changes = {"epochs": 3, "batch_size": 5, "lr": 0.7, "weight_decay": 0.6, "label_smoothing": 0.5}
    assert command.choose_recipe(args, torch.device("cuda")) == recipe.with_changes(**changes)
    assert recipe.amp == "float16"
    assert command.choose_recipe(args, CPU) == recipe.with_changes(**changes, amp="bfloat16")


@pytest.mark.parametrize("amp", [None, "bfloat16"])
def test_a_step_is_as_the_recipe_says(amp: str | None, tmp_path: Path) -> None:
    """Of Nesterov's momentum, by the loss of smoothed labels, in mixed precision or not."""
    recipe = replace(EVERYTHING, mirror=False, erase=0.0, amp=amp, label_smoothing=0.3)
    task, types = training(mnist(tmp_path / "data", 4, 2), "parnet_fashion", recipe), []
    pixels, truth = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8), torch.arange(4)
    same = copy.deepcopy(task.model)
    task.model.head["fc"].register_forward_hook(lambda *given: types.append(given[2].dtype))
    expected = F.cross_entropy(same(task._input(pixels)), truth, label_smoothing=0.3).item()
    assert task._step(pixels, truth) == pytest.approx(expected, rel=0.05 if amp else 1e-4)
    assert types == [torch.bfloat16 if amp else torch.float32]
    assert all(group["nesterov"] for group in task.optimizer.param_groups)


@pytest.mark.parametrize("amp", [None, "bfloat16", "float16"])
def test_a_run_that_diverges_ends_in_one_line(amp: str | None, tmp_path: Path) -> None:
    """In float16 behind its epoch, since the scaler leaves out a step of which gradients are not finite."""
    recipe = recipes.load("fashion").with_changes(epochs=9, batch_size=4, lr=1e6).with_changes(amp=amp)
    task = training(mnist(tmp_path / "data", 40, 4), "parnet_fashion", recipe)
    with pytest.raises(ParNetError, match=r"epoch [12].* (is nan|is inf|are not finite); give a smaller --lr") as error:
        run(task)
    assert ("step" in str(error.value)) == (amp != "float16") and len(task.log) < 2


def test_batch_norms_that_are_no_numbers_end_a_run(tmp_path: Path) -> None:
    recipe = recipes.load("fashion").with_changes(epochs=2, batch_size=4)
    task = training(mnist(tmp_path / "data", 8, 4), "parnet_fashion", recipe)
    next(task.model.buffers()).fill_(float("nan"))
    with pytest.raises(ParNetError, match="epoch 1: loss, weights or batch norms are not finite"):
        run(task)


def test_a_row_tells_of_its_own_epoch(tmp_path: Path) -> None:
    recipe = recipes.load("fashion").with_changes(epochs=2, batch_size=4)
    task, losses = training(mnist(tmp_path / "data", 8, 4), "parnet_fashion", recipe), []
    step = task._step
    task._step = lambda *given: losses.append(step(*given)) or losses[-1]  # type: ignore[method-assign]
    task._tested = lambda: [1, 5, 7]  # type: ignore[method-assign]
    run(task)
    assert [row["loss"] for row in task.log] == [round(sum(own) / 2, 4) for own in (losses[:2], losses[2:])]
    assert all((row["test_accuracy"], row["test_top5"]) == (1 / 7, 5 / 7) for row in task.log)


def test_the_average_of_the_weights_is_what_is_tested(tmp_path: Path) -> None:
    task = training(mnist(tmp_path / "data", 10, 5), "parnet_fashion", EVERYTHING)
    with torch.no_grad():
        for model, always in ((task.model, 2), (task.average.module, 9)):
            model.head["fc"].bias[always] = 1e6
    assert task._tested()[0] == 0, "of classes 0 to 4"


def test_a_checkpoint_is_begun_with_as_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = GOLDEN / "official_narrow_silu.pth.tar"
    draw(tmp_path, {"train": 1, "val": 1})
    words = (tmp_path, "--out", tmp_path / "o.safetensors", "--checkpoint", path, "--ema", "--activation", "relu")
    monkeypatch.setattr(sys, "argv", ["train", *map(str, (*words, "--img-size", 64, "-b", 3))])
    args = command.parse_arguments()
    task = command.prepare(args, command.choose_recipe(args, CPU), ALONE, CPU, Console(quiet=True))
    config, weights = task.model.config, task.model.state_dict()
    assert (config.activation, config.image_size, task.train.preprocess.size) == ("relu", 64, 64)
    averaged, plain = (load_checkpoint(path, ema=ema).state_dict() for ema in (True, False))
    same = [key for key in averaged if not key.startswith("head.") and torch.equal(weights[key], averaged[key])]
    assert len(same) == sum(not key.startswith("head.") for key in averaged)
    assert not all(torch.equal(weights[key], plain[key]) for key in same)


def test_ranks_share_training_and_testing(tmp_path: Path) -> None:
    """The answer is always the same, with classes 0 to 4 in front."""
    recipe = recipes.load("fashion").with_changes(epochs=1, batch_size=2, ema=0.0)
    task, taken = training(mnist(tmp_path / "data", 10, 7), "parnet_fashion", recipe), []
    task.model = torch.nn.Module()
    task.model.forward = lambda x: -torch.arange(10.0).expand(len(x), 10)
    task.train.for_training = lambda groups, *_: taken.append(torch.cat(groups).tolist()) or iter(())  # type: ignore[method-assign]
    task.order = torch.arange(10)
    assert task._tested() == [1, 5, 7]
    for rank, counted in ((0, [1, 3, 4]), (1, [0, 2, 3])):
        task.ranks, task.steps = Ranks(rank, 2, rank, 2), 2
        assert task._tested() == counted
        task._steps(lambda: None, 1000, Console(quiet=True))
    assert taken == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_disk_that_fills_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    data, out = mnist(tmp_path / "data", 8, 2), tmp_path / "out" / "c.safetensors"
    out.parent.mkdir()
    words = map(str, (ROOT / "launch" / "train.py", data, "--out", out, "--epochs", 1, "-b", 4))
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, *words], preexec_fn=small, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2 and "c.safetensors.state: cannot be written (File too large)" in run.stderr
    assert run.stderr.count("\n") == 1 and not list(out.parent.iterdir())


def test_what_is_refused_in_one_line(tmp_path: Path, here: Callable) -> None:
    data, out = mnist(tmp_path / "data", 8, 2), tmp_path / "c.safetensors"
    out.with_name("c.safetensors.state").write_text("no state")
    run = here("train", data, "-b", 4, "--out", out)
    assert run.returncode == 2 and "no state of a training run" in run.stderr and run.stderr.count("\n") == 1
    assert not out.exists()
    told = ("--log", tmp_path / "c.jsonl", "--curve", tmp_path / "c")
    run = here("train", data, "--out", tmp_path / "d.safetensors", *told)
    assert run.returncode == 2 and "c.jsonl: named twice" in run.stderr, run.stderr
    with pytest.raises(ParNetError, match="give a smaller --batch-size"):
        training(data, "parnet_fashion", recipes.load("fashion"))
    with pytest.raises(ParNetError, match="--recipe none: give a file, or one of cifar"):
        recipes.load("none")
    with pytest.raises(ParNetError, match="lr nan: must be 0 to"):
        recipes.load("cifar").with_changes(lr=float("nan"))
    draw(tmp_path / "shapes", {"train": 1, "val": 1})
    (tmp_path / "shapes" / "val" / "disc").rename(tmp_path / "shapes" / "val" / "dice")
    with pytest.raises(ParNetError, match="class 'dice' is not among the pictures of both train/ and val/"):
        check_same_classes(*(open_split(tmp_path / "shapes", part) for part in (TRAIN, TEST)))
