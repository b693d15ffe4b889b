"""How much of the latency the steps of the busiest lane explain, and how much their work: T = a steps + b work + c."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel_parnet import ParNetError


@dataclass(frozen=True)
class Fit:
    """Coefficients with 95% intervals. a: ms a step; b: ms a GFLOP; c: ms.

    share_steps, share_work: parts of the explained variance, averaged over the two orders in which the terms can enter
    (Lindeman, Merenda and Gold's method); with r2 they tell how much each explains.
    """

    a: float
    b: float
    c: float
    a_interval: tuple[float, float]
    b_interval: tuple[float, float]
    c_interval: tuple[float, float]
    r2: float
    share_steps: float
    share_work: float

    @property
    def crossover(self) -> float | None:
        """GFLOP a step at which its work costs as much as the step itself; None where none does, or every one."""
        return self.a / self.b if self.a > 0 and self.b > 0 else None


def fit(steps: Sequence[float], gflops: Sequence[float], ms: Sequence[float]) -> Fit:
    """Least squares on relative errors, since latencies span orders of magnitude; intervals by resampling points.

    Raises ParNetError for fewer than 4 points, or where steps and work do not vary independently.
    """
    d, w, t = (np.asarray(v, dtype=float) for v in (steps, gflops, ms))
    if len(t) < 4 or not len(d) == len(w) == len(t) or not ((t > 0) & (t < np.inf)).all():
        raise ParNetError(f"{len(t)} points: a fit needs four or more, with steps, work and a positive time each")
    columns = {"steps": d, "work": w}
    if np.linalg.matrix_rank(np.column_stack([d, w, np.ones_like(d)])) < 3:
        raise ParNetError("steps and work must both vary, and not together")

    def coefficients(d: np.ndarray, w: np.ndarray, t: np.ndarray) -> np.ndarray:
        weighted = np.column_stack([d, w, np.ones_like(d)]) / t[:, None]
        return np.linalg.lstsq(weighted, np.ones_like(t), rcond=None)[0]

    from scipy.stats import bootstrap  # here, since that takes a second

    best = coefficients(d, w, t)
    draws = bootstrap(
        (d, w, t), coefficients, paired=True, vectorized=False, n_resamples=2000, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    intervals = [(float(low), float(high)) for low, high in zip(draws.low, draws.high, strict=True)]
    both, only_steps, only_work = (_r2([columns[n] for n in names], t) for names in (columns, ["steps"], ["work"]))
    return Fit(
        *map(float, best), *intervals, both,
        share_steps=(only_steps + both - only_work) / 2, share_work=(only_work + both - only_steps) / 2,
    )  # fmt: skip


def _r2(columns: list[np.ndarray], t: np.ndarray) -> float:
    """Explained share of the variance of relative latency, against the best constant."""
    ones, one = np.ones_like(t), 1 / t
    weighted = np.column_stack([*columns, ones]) * one[:, None]
    residual = ones - weighted @ np.linalg.lstsq(weighted, ones, rcond=None)[0]
    constant = ones - one * (one @ ones / (one @ one))
    return float(1 - (residual @ residual) / (constant @ constant))
