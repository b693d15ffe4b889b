"""Energy of the CPU packages, from the counters that Linux shows under /sys/class/powercap (RAPL)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass
class Package:
    """One CPU package. energy_uj counts microjoules and starts again from 0 after max_energy_range_uj."""

    folder: Path
    limit: int
    last: int
    total: int = 0

    def read(self) -> float:
        """Joules since it was found; read it more often than the counter wraps, which takes minutes."""
        now = int((self.folder / "energy_uj").read_text())
        # the counter's last value is the limit itself, so one more step leads to 0
        self.total += now - self.last if now >= self.last else now + self.limit + 1 - self.last
        self.last = now
        return self.total * 1e-6


@dataclass
class Packages:
    """All CPU packages whose counters can be read. reason: why there are none."""

    found: list[Package] = field(default_factory=list)
    reason: str = ""

    @classmethod
    def find(cls, root: Path = POWERCAP) -> Packages:
        """intel-rapl:0, intel-rapl:1 and so on, which AMD's processors have as well; not the parts within them."""
        found = []
        try:
            for folder in sorted(root.glob("intel-rapl:?")):
                limit = int((folder / "max_energy_range_uj").read_text())
                found.append(Package(folder, limit, int((folder / "energy_uj").read_text())))
        except OSError as error:  # root alone may read them on most systems
            return cls(reason=f"CPU energy: {error.filename} cannot be read ({error.strerror})")
        return cls(found, "" if found else f"CPU energy: no RAPL counters under {root}")

    def read(self) -> float | None:
        """Joules of all packages since they were found."""
        return sum(package.read() for package in self.found) if self.found else None
