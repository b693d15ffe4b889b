"""Times in numbers: percentiles, ratios with intervals, and whether they can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 4000
# as trtexec warns: times that vary by more, clocks that move by more, a host that takes so much of the GPU's time
VARIATION = 0.025
ENQUEUE = 0.8
PERCENTILES = {"median": 50, "p90": 90, "p95": 95, "p99": 99}

Interval = tuple[float, float]


def summary(times: Sequence[float]) -> dict[str, float]:
    """Minimum, mean, median and percentiles in milliseconds."""
    ms = np.asarray(times) * 1e3
    found = {"min": ms.min(), "mean": ms.mean(), **{k: np.percentile(ms, q) for k, q in PERCENTILES.items()}}
    return {name: round(float(value), 5) for name, value in found.items()}


def median_interval(times: Sequence[float]) -> Interval:
    """95% interval of the median, by resampling."""
    return _interval((np.asarray(times),), lambda a, axis: np.median(a, axis=axis), False)


def ratio(numerator: Sequence[float], denominator: Sequence[float], paired: bool) -> tuple[float, ...]:
    """Ratio of the medians, and its 95% interval. paired: the i-th times were taken one after the other, so a slow
    spell of the machine lengthened both, and they are resampled together."""
    a, b = np.asarray(numerator), np.asarray(denominator)

    def of_medians(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    return (float(np.median(a) / np.median(b)), *_interval((a, b), of_medians, paired))


def verdicts(
    latency: Sequence[float], enqueue: Sequence[float], device: Sequence[float], clocks: Sequence[float]
) -> list[str]:
    """What makes these times unstable, in words; nothing where they are stable. clocks: MHz, as read over the run."""
    found = []
    on_device = np.isfinite(device).all() and len(device) > 0
    steady = np.asarray(device if on_device else latency)
    if (variation := steady.std() / steady.mean()) > VARIATION:
        found.append(f"times vary by {variation:.1%}")
    if on_device and (share := np.median(enqueue) / np.median(device)) > ENQUEUE:
        found.append(f"enqueue takes {share:.0%} of the GPU's time")
    if clocks and (moved := 1 - min(clocks) / max(clocks)) > VARIATION:
        found.append(f"clocks moved by {moved:.1%}")
    return found


def _interval(data: tuple[np.ndarray, ...], statistic: object, paired: bool) -> Interval:
    if min(map(len, data)) < 2:
        return float("nan"), float("nan")
    from scipy.stats import bootstrap  # here, since that takes a second

    found = bootstrap(
        data, statistic, paired=paired, vectorized=True, method="percentile", n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
