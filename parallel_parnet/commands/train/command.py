"""Train a ParNet on labelled pictures, from scratch or from a checkpoint, in one process or by torchrun.

    apt-get install dataset-fashion-mnist
    python launch/train.py /usr/share/datasets/fashion-mnist --labels launch/demo/labels.txt --out fashion.safetensors
    python launch/train.py DIR --checkpoint launch/demo/parnet_fashion.safetensors --out mine.safetensors
    python launch/train.py cifar-10-batches-bin --model parnet_cifar_1m --out cifar.safetensors --curve cifar
    torchrun --nproc-per-node 8 launch/train.py imagenet --model parnet_xl --out xl.safetensors

DIR is train/ and val/ (valid/, validation/, or else test/), each with a folder per class; or the four files of MNIST's
layout; or CIFAR's batches, binary or in Python. A checkpoint keeps its classifier where the classes are the same, by
name, and gets a new one where they differ; names of classes are kept in the file. MNIST's layout has none: --labels
gives them, and without them a checkpoint keeps its classifier where it has as many classes.

A recipe is a file of JSON, one of the package's or your own; without --recipe it is that of the model, and fine-tune
with --checkpoint. Its batch size is that of each rank.

OUT.state, beside the file to be written, keeps the whole run after every epoch, and after every --save-steps. The same
command goes on from it, bit for bit, whatever had stopped it; it is removed at the end. OUT.state.lock beside it keeps
a second run away for as long.

Exit status: 0, also where a picture was skipped, as the last line says: torchrun would begin all of it again; 1 where
a rank was lost; 2 for wrong input; 130, 143 and 129 after SIGINT, SIGTERM and SIGHUP.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console

from parallel_parnet import ParNetError
from parallel_parnet.files import check_writable, write_json
from parallel_parnet.network.checkpoint import save_checkpoint
from parallel_parnet.network.variants import ACTIVATIONS
from parallel_parnet.preprocess import Preprocess
from parallel_parnet.transport import agree, join_ranks

from ..common import DEMO_MODEL, Parser, count, named, pixels, plain_console, positive, read_checkpoint
from ..data.finding import open_split
from ..data.split import TRAIN, VAL, read_names
from ..locking import held
from ..ranks import Ranks
from ..stopping import stop_on_signals
from . import curve, state
from .batches import Pictures
from .loop import Training
from .network import check_same_classes, fresh, tuned
from .recipe import Recipe, default, load, names

SAID = 10  # reasons of skipped pictures on the terminal
CHANGES = ("epochs", "batch_size", "lr", "weight_decay", "label_smoothing")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("data", type=Path, metavar="DIR", help="labelled pictures, in any of the layouts above")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write, .safetensors")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-m", "--model", help=f"variant to train from scratch (default: {DEMO_MODEL})")
    source.add_argument("--checkpoint", type=Path, help="weights to begin with, .pth.tar or .safetensors")
    parser.add_argument("--ema", action="store_true", help="take the checkpoint's averaged weights")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="default: the checkpoint's own, else silu")
    parser.add_argument("--labels", type=Path, help="text file with a class name per line, for layouts without names")
    parser.add_argument("--recipe", metavar="NAME", help=f"{', '.join(names())}, or a file")
    changes = parser.add_argument_group("in place of the recipe's")
    changes.add_argument("--epochs", type=int)
    changes.add_argument("-b", "--batch-size", type=int, help="pictures of a step, of each rank")
    changes.add_argument("--lr", type=float)
    changes.add_argument("--weight-decay", type=float)
    changes.add_argument("--label-smoothing", type=float)
    parser.add_argument("--img-size", type=pixels, help="pixels; default: the network's own")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="compute threads; default: OMP_NUM_THREADS, else a share of cores")
    parser.add_argument("--log", type=Path, metavar="FILE", help="settings and every epoch, as JSON")
    parser.add_argument("--curve", type=named, metavar="STEM", help="every epoch as STEM.jsonl and STEM.png")
    parser.add_argument("--save-steps", type=count, default=1000, help="until OUT.state is kept (default: %(default)s)")
    parser.add_argument("--timeout", type=positive, default=600, help="seconds that ranks wait (default: %(default)s)")
    args = parser.parse_args()
    if args.ema and args.checkpoint is None:
        raise ParNetError("--ema: random weights have no average; give a --checkpoint")
    if args.out.suffix != ".safetensors":
        raise ParNetError(f"--out {args.out}: give a name that ends in .safetensors")
    drawn = curve.files(args.curve) if args.curve else ()
    check_writable(args.out, state.beside(args.out), args.log, *drawn, reads=[args.checkpoint, args.labels])
    return args


def choose_recipe(args: argparse.Namespace, device: torch.device) -> Recipe:
    """The recipe with what the arguments change; in bfloat16 on a CPU where it says float16."""
    name = args.recipe or default(None if args.checkpoint else args.model or DEMO_MODEL)
    recipe = load(name).with_changes(**{change: getattr(args, change) for change in CHANGES})
    if recipe.amp == "float16" and device.type == "cpu":
        return recipe.with_changes(amp="bfloat16")  # for which a CPU may have instructions
    return recipe


def prepare(args: argparse.Namespace, recipe: Recipe, ranks: Ranks, device: torch.device, console: Console) -> Training:
    """Network and pictures, before the first step."""
    train, test = open_split(args.data, TRAIN), open_split(args.data, VAL)
    if args.labels:
        train, test = (split.named(read_names(args.labels)) for split in (train, test))
    check_same_classes(train, test)
    console.print(f"training on {train.told(args.data)}\ntesting on {test.told(args.data)}")
    torch.manual_seed(args.seed)
    if args.checkpoint:
        model, numbers, words = tuned(read_checkpoint(args.checkpoint, args), args.img_size, train)
    else:
        model, numbers, words = fresh(args.model or DEMO_MODEL, args.activation, args.img_size, train)
    if words:
        console.print(words)
    preprocess = Preprocess.of(model.config)
    sides = Pictures(train, numbers, preprocess), Pictures(test, numbers, preprocess)
    return Training(model, recipe, *sides, ranks, device, args.seed)


def settings_of(args: argparse.Namespace, training: Training) -> str:
    """What the bits of a run depend on; a GPU has random numbers of its own."""
    return json.dumps([
        training.recipe.text(), args.seed, training.ranks.world, str(args.checkpoint), args.ema,
        str(training.model.config), training.device.type, training.train.split.digest, training.test.split.digest,
    ])  # fmt: skip


def record(args: argparse.Namespace, recipe: Recipe, training: Training, began: str) -> dict:
    """What --log holds."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return {
        "settings": settings | {"recipe": json.loads(recipe.text()), "ranks": training.ranks.world},
        "torch": torch.__version__, "date": began, "epochs": training.log,
        "test_accuracy": training.log[-1]["test_accuracy"],
    }  # fmt: skip


def main() -> int:
    stop_on_signals()
    args, ranks = parse_arguments(), Ranks.from_environment()
    with held(state.beside(args.out)) if ranks.rank == 0 else nullcontext():
        return train(args, ranks)


def train(args: argparse.Namespace, ranks: Ranks) -> int:
    """A rank's part in the whole of it; returns the exit status."""
    ranks.take_threads(args.threads)
    console = plain_console(quiet=ranks.rank != 0, soft_wrap=True)
    device, began = ranks.device(args.device), time.strftime("%Y-%m-%d")
    recipe = choose_recipe(args, device)
    if ranks.world > 1:
        join_ranks(device, args.timeout)
    training = prepare(args, recipe, ranks, device, console)
    settings = settings_of(args, training)
    kept = state.beside(args.out)

    def tell() -> None:
        if ranks.rank == 0 and training.log and args.log:
            write_json(args.log, record(args, recipe, training, began))
        if ranks.rank == 0 and training.log and args.curve:
            curve.write(training.log, f"{args.out.name}, trained on {args.data.resolve().name}", args.curve)

    if found := state.read(kept, settings):
        training.restore(found)
        tell()  # it may have been killed before it did, and after its last epoch there is no other
        console.print(f"{kept}: going on with epoch {training.epoch}, after step {training.step} of {training.steps}")
    if ranks.world > 1:  # on machines that share no folder some may have found none
        agree({f"where {kept.name} goes on": f"epoch {training.epoch}, step {training.step}"})

    def keep() -> None:
        content = training.state() | {"settings": settings}
        if ranks.rank == 0:
            state.write(kept, content)
        if not training.step:
            tell()

    training.run(keep, args.save_steps, console)
    skipped = training.skipped()
    for reason in list(skipped.values())[:SAID]:
        console.print(f"skipped: {reason}")
    if ranks.rank == 0:
        save_checkpoint(training.result.to("cpu"), args.out)
        kept.unlink(missing_ok=True)
        last = training.log[-1]
        lost = sum(name.startswith("train ") for name in skipped)
        console.print(
            f"{args.out}: {last['test_accuracy']:.2%} of {last['test_pictures']} test pictures right; skipped "
            f"{len(skipped) - lost} of {len(training.test)} test and {lost} of {len(training.train)} training pictures"
        )
    return 0
