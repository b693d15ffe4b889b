"""Sampling: NVML through a made-up library, and NVML's real package without a driver."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from types import SimpleNamespace

import pynvml
import pytest
import torch

from parallel_parnet.profiling import nvml, sampler
from parallel_parnet.profiling.sampler import Sampler


class MadeUpNvml:
    """NVML as it might answer: made up, recorded from no GPU. Constants and errors are the real package's."""

    def __init__(self, throttling: int = 0, clocks: tuple[int, ...] = (1980,), energy: bool = True) -> None:
        self.calls: list[str] = []
        self.throttling, self.clocks, self.energy = throttling, itertools.cycle(clocks), energy
        self.joules, self.sent = itertools.count(5_000_000, 7000), itertools.count(100, 8)

    def __getattr__(self, name: str) -> object:
        return getattr(pynvml, name)  # NVML_SUCCESS, NVMLError and other constants

    def nvmlInit(self) -> None:  # noqa: N802
        self.calls.append("init")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.calls.append("shutdown")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return f"made-up {handle}"

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return 412_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if not self.energy:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return next(self.joules)

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:  # noqa: N802
        return next(self.clocks) if clock == pynvml.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:  # noqa: N802
        return self.throttling

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=93, memory=41)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=3 * 2**30)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        return 58

    def nvmlDeviceGetPcieThroughput(self, handle: str, counter: int) -> int:  # noqa: N802
        return {pynvml.NVML_PCIE_UTIL_TX_BYTES: 1200, pynvml.NVML_PCIE_UTIL_RX_BYTES: 3400}[counter]

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[tuple[int, int]]) -> list[SimpleNamespace]:  # noqa: N802
        ((field, scope),) = fields
        assert scope == 2**32 - 1, "of all links"
        if field == pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX:
            return [SimpleNamespace(nvmlReturn=pynvml.NVML_ERROR_NOT_SUPPORTED)]
        value = SimpleNamespace(ullVal=next(self.sent))
        return [SimpleNamespace(nvmlReturn=pynvml.NVML_SUCCESS, value=value)]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Callable[[MadeUpNvml], Sampler]:
    """A tenth of a second of a GPU, a hundred samples a second."""
    monkeypatch.setattr(sampler, "RATE", 100)
    monkeypatch.setattr(sampler, "uuids", lambda: ["GPU-1"])

    def sample(library: MadeUpNvml) -> Sampler:
        monkeypatch.setattr(nvml, "pynvml", library)
        with Sampler() as found:
            time.sleep(0.1)
        return found

    return sample


def test_a_gpu(sampled: Callable) -> None:
    library = MadeUpNvml()
    result = sampled(library).summary(pictures=10)
    (gpu,) = result["gpus"]
    assert library.calls == ["init", "shutdown"]
    assert 3 <= result["samples"] <= result["seconds"] * 100 + 2, "100 a second at most, and one at each end"
    assert result["rate_hz"] == 100
    assert result["seconds"] > 0.1
    assert gpu["name"] == "made-up GPU-1"
    assert gpu["energy_j"] == pytest.approx(7 * (result["samples"] - 1))
    assert result["energy_per_picture_j"] == pytest.approx(gpu["energy_j"] / 10)
    assert gpu["power"]["mean"] == pytest.approx(412)
    assert gpu["sm_clock"] == {"mean": 1980, "min": 1980, "max": 1980}
    assert gpu["pcie_received"]["max"] == 3.4e6
    assert gpu["nvlink_sent"] == 8 * 1024 * (result["samples"] - 1)
    assert "nvlink_received" not in gpu, "what a GPU does not tell is left out"
    assert gpu["throttling"] == []


def test_energy_without_a_counter_is_power_times_time(sampled: Callable) -> None:
    result = sampled(MadeUpNvml(energy=False)).summary(pictures=1)
    assert result["energy_per_picture_j"] == pytest.approx(412 * result["seconds"])


def test_throttling_and_moving_clocks_are_told(sampled: Callable) -> None:
    throttling = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
    said: list[str] = []
    sampled(MadeUpNvml(throttling, clocks=(1980, 1500))).tell(said.append)
    assert said[:2] == [
        "warning: made-up GPU-1 throttled during the measurement: power cap",
        "warning: made-up GPU-1's SM clock moved between 1500 and 1980 MHz",
    ]
    assert sampled(MadeUpNvml(pynvml.nvmlClocksEventReasonGpuIdle, clocks=(1980, 1975))).warnings() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a driver")
def test_without_a_driver_it_is_said_where_there_should_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with Sampler() as found:
        pass
    said: list[str] = []
    found.tell(said.append)
    assert not said, "on a CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found.tell(said.append)
    assert said == ["not sampled: GPU sampling: NVML Shared Library Not Found"]
    summary = found.summary(pictures=1)
    assert summary["gpus"] == []
    assert summary["energy_per_picture_j"] is None


def test_a_module_that_lacks_names_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the package pynvml, which takes the place of nvidia-ml-py's module."""
    monkeypatch.setattr(nvml, "pynvml", SimpleNamespace(__file__="pynvml/__init__.py"))
    with Sampler() as found:
        pass
    (absent,) = found.absent
    assert "pynvml/__init__.py lacks names of nvidia-ml-py" in absent and found.summary(pictures=1)["gpus"] == []
