"""Nothing is timed that gives wrong answers: what must hold before a benchmark starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from parallel_parnet import Engine, ParNetError, ParNetWarning, Program, fold, load_checkpoint
from parallel_parnet.parity import LIMIT, relative

from ..common import ROOT
from .running import Entry
from .subject import Subject

GOLDEN = ROOT / "tests" / "golden"
# Relative errors of logits that pass. Of int8: steps of a 255th of a range put an error of about 1% on features, and
# another on weights; both are 1.6%, and 5% where 11 levels add up by chance. Libraries were 2% to 4% off on ParNet-S,
# and 2% to 9% on the demo. Logits that do not depend on the picture were 14% off at best on ParNet-S, elsewhere more.
LIMITS = {**LIMIT, torch.int8: 0.1}


def prove_golden() -> None:
    """Logits that the released code gave for the golden checkpoints, by the reference executor."""
    files = sorted(GOLDEN.glob("*.golden.pt"))
    if not files:
        raise ParNetError(f"{GOLDEN}: no golden files, so parity cannot be shown; run in a whole checkout")
    for path in files:
        content = torch.load(path, weights_only=True)
        checkpoint = path.with_name(path.name.replace(".golden.pt", ".pth.tar"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParNetWarning)  # these widths are no variant's
            reference = _reference(fold(load_checkpoint(checkpoint, activation=content["activation"])))
        for case in content["cases"]:
            if "logits" in case:
                _hold(f"the reference on {path.name}", relative(reference(case["input"]), case["logits"]))


@torch.inference_mode()
def expected_logits(subject: Subject, pictures: Sequence[Tensor]) -> list[Tensor]:
    """fp32 logits on the CPU, by the reference executor, after a check that the network in training form agrees."""
    pictures = [picture.cpu() for picture in pictures]
    trained = [subject.network(picture) for picture in pictures]
    logits = list(map(_reference(subject.program), pictures))
    for got, wanted in zip(logits, trained, strict=True):
        _hold("the folded network", relative(got, wanted))
    return logits


def prove_ours(entries: Iterable[Entry]) -> None:
    """Every executor of ours within the limit of its type."""
    for entry in entries:
        if entry.contender.ours and entry.runner is not None:
            _hold(entry.name, entry.error, limit(entry))


def limit(entry: Entry) -> float:
    """How far a contender's logits may be off, relative, by its type and its products."""
    return LIMITS[entry.subject.dtype] * entry.contender.margin


def agrees(entry: Entry) -> bool:
    """Whether a contender runs, and gave the reference's logits as nearly as its type allows."""
    return entry.error <= limit(entry)


def left_out(entries: Sequence[Entry], name: Callable[[Entry], str] = lambda entry: entry.name) -> dict:
    """By name, as a result has them: why those that are missing are, how far those are off that run and give other
    logits, and which of ours failed."""
    return {
        "missing": {name(entry): entry.missing for entry in entries if entry.missing},
        "disagree": {
            name(entry): f"logits off by {entry.error:.1e}, relative (limit {limit(entry):.0e})"
            for entry in entries
            if entry.runner is not None and not agrees(entry)
        },
        "failed": [name(entry) for entry in entries if entry.failed],
    }


def _hold(what: str, error: float, most: float = LIMIT[torch.float32]) -> None:
    if not error <= most:
        raise ParNetError(
            f"parity fails, so nothing is timed: {what} is off by {error:.1e}, relative (limit {most:.0e})"
        )


def _reference(program: Program) -> Engine:
    return Engine(program, device="cpu", executor="reference")
