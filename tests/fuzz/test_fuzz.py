"""Five thousand inputs: whatever people, disks and launchers feed the program, it says why not in a line, or is right.

The same ones each time; `make fuzz` goes on to a million others.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.inputs import KINDS, Kind

SAME = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_refused_or_right(kind: Kind, tmp_path: Path) -> None:
    @settings(SAME, max_examples=KINDS[kind])
    @given(rng=st.randoms(use_true_random=True))
    def holds(rng: Random) -> None:
        kind(rng, tmp_path)

    holds()
