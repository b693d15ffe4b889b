"""Training itself: steps, epochs, tests, and a state from which all of it goes on with the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from parallel_parnet import ParNet, ParNetError

from ..infer.many import progress_bar
from ..ranks import Ranks
from .augment import erased, mirrored_and_moved
from .batches import Pictures
from .ranks import everyones, everyones_words, parallel, same, totals, waiting
from .recipe import Recipe

MOMENTUM = 0.9
APART = 1_000_003  # seeds of two ranks


class Training:
    """A run, from its first step or from where `restore` puts it.

    model: in training form, on the CPU. train, test: its pictures, counted as it counts. seed: of everything random.
    Ranks share each step: each takes every so-manyth picture of the epoch's order.
    """

    def __init__(
        self, model: ParNet, recipe: Recipe, train: Pictures, test: Pictures, ranks: Ranks, device: torch.device,
        seed: int,
    ) -> None:  # fmt: skip
        self.recipe, self.train, self.test, self.ranks, self.device = recipe, train, test, ranks, device
        self.steps = len(train) // (recipe.batch_size * ranks.world)
        if not self.steps:
            raise ParNetError(
                f"{len(train)} pictures, and {recipe.batch_size} for each of {ranks.world} rank(s) in a step: "
                "give a smaller --batch-size"
            )
        self.model = model.to(device, memory_format=torch.channels_last)
        average = partial(_averaged, recipe.ema)
        self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True) if recipe.ema else None
        self.optimizer = SGD(parameter_groups(self.model, recipe), recipe.lr, momentum=MOMENTUM, nesterov=True)
        self.schedule = _schedule(self.optimizer, recipe, recipe.epochs * self.steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "float16")
        size = train.preprocess.size
        self.stepped = parallel(self.model.train(), device, torch.zeros(2, 3, size, size, device=device))
        self.seed, self.epoch, self.step, self.loss_sum = seed, 1, 0, 0.0
        self.order = torch.zeros(0, dtype=torch.int64)
        self.log: list[dict] = []
        self.before: dict[str, str] = {}  # pictures that were skipped before the run was interrupted
        if ranks.rank:
            torch.manual_seed(seed + APART * ranks.rank)

    @property
    def result(self) -> ParNet:
        """The moving average of the weights, where there is one."""
        return self.model if self.average is None else self.average.module

    def skipped(self) -> dict[str, str]:
        """A reason for each picture that any rank could not read. Every rank calls it."""
        parts = {"train": self.train.skipped, "test": self.test.skipped}
        own = {f"{part} {name}": reason for part, found in parts.items() for name, reason in found.items()}
        return everyones_words(self.before | own)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on. Every rank calls it; rank 0's is the run's."""
        random = [torch.get_rng_state()]
        if self.device.type == "cuda":  # which drops out
            random.append(torch.cuda.get_rng_state(self.device))
        return {
            "model": self.model.state_dict(), "average": self.average and self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(), "random": [everyones(kind) for kind in random],
            "epoch": self.epoch, "step": self.step, "loss_sum": self.loss_sum, "order": self.order, "log": self.log,
            "skipped": self.skipped(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for part in ("optimizer", "schedule", "scaler"):
            getattr(self, part).load_state_dict(state[part])
        self.epoch, self.step, self.loss_sum = state["epoch"], state["step"], state["loss_sum"]
        self.order, self.log = state["order"], state["log"]
        self.before = state["skipped"]
        torch.set_rng_state(state["random"][0][self.ranks.rank])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"][1][self.ranks.rank], self.device)

    def run(self, keep: Callable[[], None], every: int, console: Console) -> None:
        """Train to the last epoch; `keep` is called after every so many steps and each epoch, by all ranks."""
        while self.epoch <= self.recipe.epochs:
            start = time.perf_counter()
            if not self.step:
                self.order = same(torch.randperm(len(self.train)))
                self.loss_sum = 0.0
            self._steps(keep, every, console)
            self._refuse_divergence()
            top1, top5, of = self._tested()
            row = {
                "epoch": self.epoch, "loss": round(self.loss_sum / self.steps, 4),
                "test_accuracy": top1 / of, "test_top5": top5 / of, "test_pictures": of,
                "lr": float(f"{self.optimizer.param_groups[0]['lr']:.3g}"),
            }  # fmt: skip
            self.log.append(row)
            self.epoch, self.step = self.epoch + 1, 0
            console.print(f"{row} {time.perf_counter() - start:.0f} s")
            keep()

    def _refuse_divergence(self) -> None:
        """Raise ParNetError, on every rank, after an epoch that left NaN or inf on any: float16's scaler leaves such
        steps out and goes on for ever, and batch norms have seen them."""
        finite = math.isfinite(self.loss_sum) and all(t.isfinite().all() for t in self.result.state_dict().values())
        if totals([not finite]) != [0]:
            raise ParNetError(f"epoch {self.epoch}: loss, weights or batch norms are not finite; give a smaller --lr")

    def _steps(self, keep: Callable[[], None], every: int, console: Console) -> None:
        batch, ranks = self.recipe.batch_size, self.ranks
        mine = self.order[ranks.rank :: ranks.world].split(batch)[self.step : self.steps]
        self.model.train()
        with progress_bar(console) as progress:
            task = progress.add_task(f"epoch {self.epoch}", total=self.steps * batch, completed=self.step * batch)
            key = f"{self.seed} {self.epoch}"
            for pixels, truth in self.train.for_training(list(mine), self.recipe, key):
                self.loss_sum += self._step(pixels, truth)
                self.step += 1
                progress.advance(task, batch)
                if self.step % every == 0 and self.step < self.steps:
                    keep()

    def _step(self, pixels: Tensor, truth: Tensor) -> float:
        """The loss of a batch, uint8 [N, H, W, 3] and int64 [N], after which the weights have moved."""
        recipe = self.recipe
        x = self._input(mirrored_and_moved(pixels, recipe.mirror, recipe.shift))
        x = erased(x, recipe.erase) if recipe.erase else x
        amp = getattr(torch, recipe.amp or "float32")
        with waiting("training"):
            with torch.autocast(self.device.type, amp, enabled=recipe.amp is not None):
                logits = self.stepped(x)
            loss = F.cross_entropy(logits.float(), truth.to(self.device), label_smoothing=recipe.label_smoothing)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        value = loss.item()
        if not math.isfinite(value) and not self.scaler.is_enabled():
            raise ParNetError(f"epoch {self.epoch}, step {self.step + 1}: the loss is {value}; give a smaller --lr")
        return value

    def _input(self, pixels: Tensor) -> Tensor:
        return self.train.preprocess.normalise(pixels.to(self.device)).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def _tested(self) -> list[int]:
        """Test pictures whose top-1 and top-5 class is right, and how many there were: each rank takes its share."""
        model, ranks = self.result.eval(), self.ranks
        for buffer in model.buffers():  # batch norms have seen each rank's own pictures; rank 0's are kept
            same(buffer)
        found = [0, 0, 0]
        for pixels, truth in self.test.for_testing(
            range(ranks.rank, len(self.test), ranks.world), self.recipe.batch_size
        ):
            logits = model(self._input(pixels))
            best = logits.topk(min(5, logits.shape[1])).indices.cpu() == truth.unsqueeze(1)
            found = [found[0] + int(best[:, 0].sum()), found[1] + int(best.sum()), found[2] + len(truth)]
        found = totals(found)
        if not found[2]:  # on any rank
            reason = next(iter(self.test.skipped.values()), "another rank has the reasons")
            raise ParNetError(f"none of {len(self.test)} pictures to test on can be read; {reason}")
        return found


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """What decays, and what does not."""
    vectors = [p for p in model.parameters() if p.ndim < 2]
    others = [p for p in model.parameters() if p.ndim >= 2]
    if recipe.decay_vectors:
        return [{"params": list(model.parameters()), "weight_decay": recipe.weight_decay}]
    return [{"params": others, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _averaged(most: float, averages: list[Tensor], current: list[Tensor], steps: Tensor) -> None:
    """Move averages towards what they are of. steps: how many they have had, which AveragedModel keeps."""
    n = int(steps)
    decay = min(most, (1 + n) / (10 + n))  # else a short run would end with what its first step had left
    get_ema_multi_avg_fn(decay)(averages, current, steps)


def _schedule(optimizer: Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    if recipe.schedule == "one-cycle":
        share = float(recipe.warm_up)
        if math.isclose(share * steps, 1):  # a rise from step 0 to step 0, by whose length torch divides
            share = (1 + 1e-9) / steps
        return OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=share)
    rise, least = round(recipe.warm_up * steps), recipe.least_lr / recipe.lr if recipe.lr else 0.0

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return least + (1 - least) * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2

    return LambdaLR(optimizer, factor)
