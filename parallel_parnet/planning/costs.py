"""What an operation and a transfer cost: devices and links as numbers, each with its source.

Seconds, bytes, FLOP/s and bytes/s throughout. Nothing here touches a device: a measurement comes in as numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from ..errors import ParNetError
from ..program.inputs import check_batch, picture_side
from ..program.program import INPUT, Operation, Program

MOST_BYTES = 1e15  # of a message
LEAST_S, MOST_S = 1e-9, 1e3  # of a message, and of a link's latency: beyond, sums of seconds lose the operations' own
BY_LANES = "shared"  # of the measured links
UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "kb/s": 1e3, "mb/s": 1e6, "gb/s": 1e9}

# NCCL send and receive inside a CUDA graph on H100, as reported in torchcomms issue #2159: bytes, seconds
NVLINK_POINTS = (
    (64 * 1024, 7.7e-6), (256 * 1024, 9.3e-6), (512 * 1024, 12.3e-6), (1024 * 1024, 15.0e-6), (4096 * 1024, 29.9e-6),
)  # fmt: skip


@dataclass(frozen=True)
class Link:
    """A way from one lane to another: `bytes_` take latency_s + bytes_ / bytes_per_s seconds.

    source: in words, where the two numbers come from. by_lanes: they copy themselves, and compute nothing meanwhile.
    """

    name: str
    latency_s: float
    bytes_per_s: float
    source: str
    by_lanes: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s <= MOST_S:
            raise ParNetError(f"link {self.name}: latency {self.latency_s:g} s; it must be from 0 to {MOST_S:g} s")
        if not self.bytes_per_s >= 1:
            raise ParNetError(f"link {self.name}: bandwidth {self.bytes_per_s:g} bytes/s; it must be at least 1")

    def seconds(self, bytes_: int) -> float:
        """Return the seconds from the start of a transfer of so many bytes to its arrival."""
        return self.latency_s + bytes_ / self.bytes_per_s

    @classmethod
    def fit(cls, name: str, points: Iterable[tuple[float, float]], source: str) -> Link:
        """Fit a line through (bytes, seconds) by least squares of relative errors; its latency is never negative.

        Relative, since an error of a microsecond matters to a small message and not to a large one.
        """
        points = list(points)
        if not points or not all(0 <= size <= MOST_BYTES and LEAST_S <= t <= MOST_S for size, t in points):
            raise ParNetError(
                f"link {name}: give messages of up to {MOST_BYTES:g} bytes, each of {LEAST_S:g} to {MOST_S:g} s"
            )
        rows = [(size, seconds, seconds**-2) for size, seconds in points]
        total = sum(w for _, _, w in rows)
        middle, mean = (sum(row[i] * row[2] for row in rows) / total for i in (0, 1))
        spread = sum(w * (size - middle) ** 2 for size, _, w in rows)
        slope = sum(w * (size - middle) * (t - mean) for size, t, w in rows) / spread if spread else 0.0
        if slope <= 0:
            raise ParNetError(f"link {name}: larger messages were not slower; measure more sizes, or more often")
        return cls(name, max(0.0, mean - slope * middle), 1 / slope, source)

    @classmethod
    def parse(cls, text: str) -> Link:
        """Read a link's numbers out of text such as "5us,20GB/s": latency in ns, us, ms or s, bandwidth in kB/s, MB/s
        or GB/s. ParNetError for other text."""
        number = r"(-?[\d.]+(?:e[+-]?\d+)?)"
        found = re.fullmatch(rf"{number}(ns|us|ms|s),{number}([kmg]b/s)", text.replace(" ", "").lower())
        try:
            if not found:
                raise ValueError
            latency, bandwidth = float(found[1]) * UNITS[found[2]], float(found[3]) * UNITS[found[4]]
        except ValueError:
            raise ParNetError(
                f"link {text!r}: choose one of {', '.join(LINKS)}, loopback, "
                "or give latency and bandwidth as 5us,20GB/s"
            ) from None
        return cls(text, latency, bandwidth, "given by hand")

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> Link:
        """Fit what `launch/infer.py --measure-links` measured: the link of this name, or the first.

        ParNetError where the file is missing or foreign, or has no such link.
        """
        try:
            content = json.loads(path.read_text())
            links = {link["link"]: content | link for link in content.get("links", [content])}
            chosen = links[name or next(iter(links))]
            points = [(float(row["bytes"]), float(row["median_s"])) for row in chosen["messages"]]
            how = chosen.get("transport", f"{chosen['link']} between two ranks")
            source = f"measured: {how}, {chosen['cpu']}, {chosen['date']}"
        except (
            OSError,
            ArithmeticError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            StopIteration,
            RecursionError,
        ) as error:
            wanted = f" {name}" if name else ""
            raise ParNetError(
                f"{path}: no measured link{wanted} ({error!r}); launch/infer.py --measure-links --json writes some"
            ) from None
        return replace(cls.fit(chosen["link"], points, source), by_lanes=chosen["link"] == BY_LANES)


NVLINK = Link.fit("nvlink", NVLINK_POINTS, "least-squares fit of NCCL in a CUDA graph on H100, torchcomms issue #2159")
LINKS = {
    link.name: link
    for link in (
        NVLINK,
        Link("peer", 2e-6, 370e9, "raw writes to a peer GPU over NVLink, as reported for H100: about 2 us, 370 GB/s"),
        Link(
            "pcie",
            NVLINK.latency_s,
            31.5e9,
            "PCIe 4.0 x16: theoretical bandwidth of one direction; latency assumed equal to NCCL's over NVLink",
        ),
    )
}


@dataclass(frozen=True)
class Roofline:
    """A device whose operations take as long as their arithmetic or their memory traffic, whichever is longer: a floor.

    launch_s: what a launch costs. grouped: operations of one level on one lane share one. source: in words.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    launch_s: float
    grouped: bool
    itemsize: int
    source: str

    def __post_init__(self) -> None:
        if not (self.flops_per_s > 0 and self.bytes_per_s > 0 and self.launch_s >= 0):
            raise ParNetError(f"device {self.name}: FLOP/s and bytes/s must be positive, the launch not negative")

    def at(self, efficiency: float) -> Roofline:
        """Return the device with kernels that reach this share of its FLOP/s and bytes/s: an assumption, and labelled
        as one."""
        if not 0 < efficiency <= 1:
            raise ParNetError(f"efficiency {efficiency:g}: it must be above 0 and at most 1")
        if efficiency == 1:
            return self
        return replace(
            self,
            name=f"{self.name} at {efficiency:.0%}",
            flops_per_s=self.flops_per_s * efficiency,
            bytes_per_s=self.bytes_per_s * efficiency,
            source=f"{self.source}; kernels assumed to reach {efficiency:.0%} of it",
        )

    def work(self, program: Program, size: int | None, batch: int, itemsize: int) -> dict[str, float]:
        """Return the seconds that each operation takes once it has been launched, by name. ParNetError where the
        device's numbers are for values of another size."""
        if itemsize != self.itemsize:
            raise ParNetError(
                f"device {self.name}: its FLOP/s are those of {self.itemsize}-byte values, not {itemsize}: "
                "give --dtype bfloat16"
            )
        rows = program.cost(size, batch, itemsize).operations
        return {row.name: max(row.flops / self.flops_per_s, row.bytes / self.bytes_per_s) for row in rows}


@dataclass(frozen=True)
class Measured:
    """A device by the seconds of each operation, as a profile gave them, launch included; they hold for one size, batch
    and type.

    own_layout: a lane copies what it has from another lane once more, into the layout in which it computes.
    """

    name: str
    seconds: Mapping[str, float]
    source: str
    launch_s: float = 0.0
    grouped: bool = False
    own_layout: bool = False

    def work(self, program: Program, size: int | None, batch: int, itemsize: int) -> dict[str, float]:
        """See `Roofline.work`."""
        if missing := [op.name for op in program.operations if op.name not in self.seconds]:
            raise ParNetError(f"device {self.name}: no time for operation {missing[0]}")
        if bad := [name for name, t in self.seconds.items() if not (t > 0 and math.isfinite(t))]:
            raise ParNetError(f"device {self.name}: operation {bad[0]} takes {self.seconds[bad[0]]} s: not positive")
        return {op.name: self.seconds[op.name] for op in program.operations}


Device = Roofline | Measured

H200 = Roofline(
    "h200", 790e12, 4.3e12, 1.3e-6, grouped=True, itemsize=2,
    source="roofline: 790 TFLOP/s and 4.3 TB/s in bf16, both measured on an H200; "
    "1.3 us a kernel boundary inside a CUDA graph, measured on an H100",
)  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """All numbers of a plan. work: seconds of each operation; transfer: seconds of each feature across the link.

    by_lanes: see `Link`. taking: seconds in which a lane copies a feature of another lane into its own layout, before
    the first operation that reads it; none where it is left out.
    """

    work: Mapping[str, float]
    transfer: Mapping[str, float]
    launch_s: float = 0.0
    grouped: bool = False
    sources: tuple[str, ...] = ()
    by_lanes: bool = False
    taking: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, program: Program, device: Device, link: Link, size: int | None = None, batch: int = 1, itemsize: int = 4
    ) -> Costs:
        """Make the costs of a program for `batch` square pictures of `size` pixels (the network's own if None),
        `itemsize` bytes a value. ParNetError for numbers that mean nothing."""
        check_batch(batch, itemsize)
        side = picture_side(program, size)
        features = [INPUT, *(op.name for op in program.operations)]
        bytes_ = {name: math.prod(program.shape(name, batch, side, side)) * itemsize for name in features}
        transfer = {name: link.seconds(size) for name, size in bytes_.items()}
        copied = isinstance(device, Measured) and device.own_layout
        taking = {name: size / link.bytes_per_s for name, size in bytes_.items()} if copied else {}
        work, sources = device.work(program, side, batch, itemsize), (device.source, link.source)
        return cls(work, transfer, device.launch_s, device.grouped, sources, link.by_lanes, taking)

    def launches(self, operations: Iterable[Operation]) -> list[tuple[Operation, ...]]:
        """Cut one lane's operations, level by level, into what one launch runs."""
        by_level = sorted(operations, key=lambda op: op.level)
        if not self.grouped:
            return [(op,) for op in by_level]
        return [tuple(group) for _, group in groupby(by_level, key=lambda op: (op.level, op.kind))]

    def seconds(self, launch: Iterable[Operation], taken: Iterable[str] = ()) -> float:
        """Return the seconds of one launch: the work of its operations adds up, the launch is paid once. taken:
        features of other lanes that none of the lane's launches before has read."""
        return self.launch_s + sum(self.work[op.name] for op in launch) + sum(self.taking.get(x, 0.0) for x in taken)
