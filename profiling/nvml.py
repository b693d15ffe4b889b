"""What NVML tells about a GPU while it works: power, energy, clocks, throttling, load, memory, heat, traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pynvml

from ..errors import ParNetError

# reasons that slow a GPU below what was asked of it; idling and clocks set by the user are none
THROTTLING = {
    "power cap": "nvmlClocksEventReasonSwPowerCap",
    "hardware slowdown": "nvmlClocksEventReasonHwSlowdown",
    "software thermal slowdown": "nvmlClocksEventReasonSwThermalSlowdown",
    "hardware thermal slowdown": "nvmlClocksEventReasonHwThermalSlowdown",
    "power brake": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
}


@dataclass(frozen=True)
class Reading:
    """One moment of one GPU; None for what this GPU or driver does not tell.

    power in W, energy in J since the driver was loaded, clocks in MHz, throttling by name, shares of the time in %,
    memory in bytes, temperature in degrees Celsius, PCIe traffic in bytes/s, NVLink counters in bytes.
    """

    power: float | None = None
    energy: float | None = None
    sm_clock: int | None = None
    memory_clock: int | None = None
    throttling: tuple[str, ...] = ()
    gpu_load: int | None = None
    memory_load: int | None = None
    memory_used: int | None = None
    temperature: int | None = None
    pcie_sent: float | None = None
    pcie_received: float | None = None
    nvlink_sent: float | None = None
    nvlink_received: float | None = None


@dataclass
class Gpu:
    """One GPU as NVML knows it. A query that it does not support is left out from then on."""

    handle: object
    name: str
    unsupported: set[str] = field(default_factory=set)

    def read(self) -> Reading:
        """Read what the GPU tells now."""
        n, h = pynvml, self.handle
        throttled = self._ask("throttling", lambda: n.nvmlDeviceGetCurrentClocksEventReasons(h)) or 0
        load = self._ask("load", lambda: n.nvmlDeviceGetUtilizationRates(h))
        memory = self._ask("memory", lambda: n.nvmlDeviceGetMemoryInfo(h))
        return Reading(
            power=self._scaled("power", lambda: n.nvmlDeviceGetPowerUsage(h), 1e-3),
            energy=self._scaled("energy", lambda: n.nvmlDeviceGetTotalEnergyConsumption(h), 1e-3),
            sm_clock=self._ask("SM clock", lambda: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
            memory_clock=self._ask("memory clock", lambda: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM)),
            throttling=tuple(name for name, bit in THROTTLING.items() if throttled & getattr(n, bit)),
            gpu_load=load and load.gpu,
            memory_load=load and load.memory,
            memory_used=memory and memory.used,
            temperature=self._ask("heat", lambda: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)),
            pcie_sent=self._pcie(n.NVML_PCIE_UTIL_TX_BYTES),
            pcie_received=self._pcie(n.NVML_PCIE_UTIL_RX_BYTES),
            nvlink_sent=self._nvlink(n.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX),
            nvlink_received=self._nvlink(n.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX),
        )

    def _pcie(self, counter: int) -> float | None:
        # KB/s over the last 20 ms
        return self._scaled(f"PCIe {counter}", lambda: pynvml.nvmlDeviceGetPcieThroughput(self.handle, counter), 1e3)

    def _nvlink(self, field_id: int) -> float | None:
        """All links together; the field's scope is the link, and every bit of it set means all of them."""

        def ask() -> int | None:
            (value,) = pynvml.nvmlDeviceGetFieldValues(self.handle, [(field_id, 0xFFFFFFFF)])
            return value.value.ullVal if value.nvmlReturn == pynvml.NVML_SUCCESS else None

        return self._scaled(f"NVLink {field_id}", ask, 1024)

    def _scaled(self, what: str, ask: Callable[[], int | None], unit: float) -> float | None:
        value = self._ask(what, ask)
        return None if value is None else value * unit

    def _ask(self, what: str, ask: Callable[[], Any]) -> Any:
        if what in self.unsupported:
            return None
        try:
            return ask()
        except pynvml.NVMLError:  # not supported by this GPU, driver or permission
            self.unsupported.add(what)
            return None


@contextmanager
def open_gpus(uuids: Sequence[str]) -> Iterator[list[Gpu]]:
    """The GPUs of these UUIDs, as torch names them. Raises pynvml.NVMLError where there is no driver; ParNetError where
    `pynvml` is an older module, or that of another package, which takes its place whatever is installed beside it."""
    if not all(hasattr(pynvml, name) for name in THROTTLING.values()):
        raise ParNetError(
            f"{pynvml.__file__} lacks names of nvidia-ml-py 12.535.108: pip uninstall pynvml, and install that anew"
        )
    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}") for uuid in uuids]
        yield [Gpu(handle, pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
