"""This project's executors as contenders."""

from __future__ import annotations

from parallel_parnet import Engine, ParNetError
from parallel_parnet.executors.available import EXECUTORS

from .peer_torch import emulated
from .subject import Contender, Runner, Subject, on_device, words


def ours() -> list[Contender]:
    """Every executor that the engine knows; those that are another's second name give way to it.

    "ours: auto" is the engine after `warm_up`, where that has something to choose.
    """
    return [Contender(f"ours: {name}", True, lambda subject, name=name: _build(subject, name)) for name in EXECUTORS]


def _build(subject: Subject, name: str) -> Runner:
    if subject.program is None:
        raise ParNetError(f"{subject.name} is no ParNet")
    engine = Engine(subject.program, device=subject.device, dtype=subject.dtype, executor=name)
    chosen = engine.warm_up(subject.pictures(1)[0]) if name == "auto" else {}
    if engine.executor != name and not chosen:
        raise ParNetError(f"another name for {engine.executor} here")
    plain = f"executor {name}, {subject.threads} thread(s)" if subject.device.type == "cpu" else name
    settings = next(iter(chosen), plain)
    is_emulated = engine.arithmetic == subject.dtype and emulated(subject)
    arithmetic = words(engine.arithmetic) + (", emulated" if is_emulated else "")
    return Runner(engine, settings, arithmetic, wait=on_device(subject))
