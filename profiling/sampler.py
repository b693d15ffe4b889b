"""Power, energy, clocks and load while something is measured, from a thread in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from types import TracebackType

import pynvml
import torch

from ..errors import ParNetError
from .nvml import Gpu, Reading, open_gpus

RATE = 20.0  # samples a second: NVML renews most of its values 10 to 50 times a second
CLOCK_MOVED = 0.025  # between the highest and the lowest SM clock of a measurement, as a share of the highest


@dataclass
class Sampler:
    """Samples this machine's GPUs RATE times a second, between enter and exit.

        with Sampler() as sampler:
            times = [once(x) for x in passes]
        result["sampled"] = sampler.summary(pictures=len(times) * batch_size)
        sampler.tell(console.print)

    GPUs are those that torch sees. Nothing is raised where there is no driver: `absent` says why.
    """

    absent: list[str] = field(default_factory=list)
    samples: list[list[Reading]] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)

    def __enter__(self) -> Sampler:
        self._stop, self._opened = threading.Event(), ExitStack()
        self._gpus = self._open()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        self._opened.close()

    def _open(self) -> list[Gpu]:
        try:
            return self._opened.enter_context(open_gpus(uuids()))
        except (pynvml.NVMLError, ParNetError) as error:
            self.absent.append(f"GPU sampling: {error}")
            return []

    def _run(self) -> None:
        if not self._gpus:
            return
        while not self._stop.wait(1 / RATE):
            self._sample()

    def _sample(self) -> None:
        self.moments.append(time.perf_counter())
        self.samples.append([gpu.read() for gpu in self._gpus])

    def summary(self, pictures: int) -> dict:
        """Sum up for result files: for each GPU the mean, lowest and highest of every value, and energy for each
        picture.

        energy_j of a GPU is the difference of its own counter; where it has none, power times time.
        """
        gpus = self._summaries()
        joules = [gpu["energy_j"] for gpu in gpus if gpu["energy_j"] is not None]
        return {
            "seconds": self.moments[-1] - self.moments[0],
            "samples": len(self.samples),
            "rate_hz": RATE,
            "gpus": gpus,
            "energy_per_picture_j": sum(joules) / pictures if joules and pictures else None,
            "absent": self.absent,
        }

    def _summaries(self) -> list[dict]:
        return [self._summary(i, gpu.name) for i, gpu in enumerate(self._gpus)]

    def _summary(self, index: int, name: str) -> dict:
        readings = [sample[index] for sample in self.samples]
        found: dict = {"name": name, "energy_j": self._energy(readings)}
        for column in fields(Reading):
            values = [value for r in readings if (value := getattr(r, column.name)) is not None]
            if column.name == "throttling":
                found["throttling"] = sorted({reason for r in readings for reason in r.throttling})
            elif values and column.name.startswith("nvlink"):  # counters: what was added
                found[column.name] = values[-1] - values[0]
            elif values and column.name != "energy":
                found[column.name] = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        return found

    def _energy(self, readings: Sequence[Reading]) -> float | None:
        counted = [r.energy for r in readings if r.energy is not None]
        if counted:
            return counted[-1] - counted[0]
        powers = [r.power for r in readings if r.power is not None]
        return sum(powers) / len(powers) * (self.moments[-1] - self.moments[0]) if powers else None

    def tell(self, say: Callable[[str], object]) -> None:
        """Say the warnings, and, where torch sees GPUs, what of them could not be sampled, in a line each."""
        for line in self.warnings():
            say(f"warning: {line}")
        if self.absent and torch.cuda.is_available():
            say(f"not sampled: {'; '.join(self.absent)}")

    def warnings(self) -> list[str]:
        """List what makes the measurement doubtful: throttling, and clocks that moved."""
        found = []
        for gpu in self._summaries():
            if gpu["throttling"]:
                found.append(f"{gpu['name']} throttled during the measurement: {', '.join(gpu['throttling'])}")
            clock = gpu.get("sm_clock")
            if clock and clock["max"] - clock["min"] > CLOCK_MOVED * clock["max"]:
                found.append(f"{gpu['name']}'s SM clock moved between {clock['min']} and {clock['max']} MHz")
        return found


def uuids() -> list[str]:
    """Return the UUIDs of the GPUs that torch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
