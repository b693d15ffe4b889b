"""What an engine's file says beside its program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .cores import usual_threads
from .errors import ParNetError
from .executors.available import DTYPES, EXECUTORS, METHODS
from .executors.backends import lacking
from .gpu import UNKNOWN, gpu_and_versions, lives_on_gpu
from .program.placement import Placement
from .program.program import Program

ON_THE_CPU = "cpu"  # in files of earlier versions: the executor "auto", on the CPU unless a GPU was named


@dataclass(frozen=True)
class Saved:
    """An engine's settings, as its file keeps them.

    executor: as asked for. chosen: what ran. cores, gpu: what placement and threads were measured on, if they were: a
    number of cores, or a GPU with its driver and the versions that compile for it. given: the placement was given by
    the user, so that it holds wherever the engine is loaded.
    """

    dtype: torch.dtype
    executor: str
    chosen: str
    placement: Placement | None
    threads: int | None
    cores: int | None
    gpu: str | None = None
    given: bool = False

    @property
    def was_measured(self) -> bool:
        """Whether `chosen` and the placement were found by measuring."""
        return self.cores is not None or self.gpu is not None

    def holds_on(self, device: torch.device, program: Program) -> bool:
        """Return whether what was measured, if it was, holds on this device of this machine."""
        if self.cores is not None:
            is_here = self.cores == usual_threads() and not lacking(METHODS[self.chosen].backend)
            return is_here and device.type == "cpu"
        if self.gpu is not None:
            is_proved = self.executor == "auto" and lives_on_gpu(device) and not program.quantised
            return is_proved and UNKNOWN not in self.gpu and gpu_and_versions(device) == self.gpu
        return True

    def text(self) -> str:
        """Return the settings as JSON."""
        placement = self.placement and vars(self.placement) | {"where": dict(self.placement.where)}
        return json.dumps(vars(self) | {"dtype": str(self.dtype), "placement": placement})

    @classmethod
    def of(cls, metadata: Mapping[str, str], program: Program) -> Saved:
        """Read the settings from a file's metadata; ParNetError where a value is missing, unknown, or out of range."""
        if "engine" not in metadata:
            raise ParNetError("holds no engine, but a program alone: Engine(Program.load(path)) runs it")
        try:
            fields = json.loads(metadata["engine"])
            fields["dtype"] = {str(dtype): dtype for dtype in DTYPES}[fields["dtype"]]
            if fields["placement"] is not None:
                fields["placement"] = _placement(**fields["placement"])
            saved = cls(**fields)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ParNetError(f"holds no engine ({error!r}); Engine.save writes one") from None
        for executor, known in ((saved.executor, (*EXECUTORS, ON_THE_CPU)), (saved.chosen, tuple(METHODS))):
            if executor not in known:
                raise ParNetError(f"unknown executor {executor!r}: choose one of {', '.join(known)}")
        for name in ("threads", "cores"):
            value = getattr(saved, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ParNetError(f"{value!r} {name}: there must be at least 1")
        if not isinstance(saved.gpu, str | None):
            raise ParNetError(f"{saved.gpu!r} is no GPU")
        if type(saved.given) is not bool:
            raise ParNetError(f"a placement was given or not, and {saved.given!r} is neither")
        if saved.placement is not None:
            saved.placement.check(program)
        return saved


def _placement(lanes: int, where: Mapping[str, list[int]], coordinator: int) -> Placement:
    placement = Placement(lanes, {name: tuple(on) for name, on in where.items()}, coordinator)
    if wrong := [x for on in ((lanes, coordinator), *placement.where.values()) for x in on if type(x) is not int]:
        raise TypeError(f"lane {wrong[0]!r}")
    return placement
