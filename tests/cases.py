"""Samples of cases that are too many for every run; KERNEL_TESTS=all runs every case."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import TypeVar

SEED = int(os.environ["TEST_SEED"])  # of conftest.py: all of pytest-xdist's workers draw the same sample
ALL = os.environ.get("KERNEL_TESTS") == "all"
Case = TypeVar("Case")


def drawn(cases: Iterable[Case], share: float) -> list[Case]:
    """All, or such a share of them, others in every run."""
    cases = list(cases)
    return cases if ALL else random.Random(SEED).sample(cases, round(share * len(cases)))
