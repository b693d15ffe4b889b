"""docs/walk.py runs, and says what its comments promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_the_walk(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "docs" / "walk.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [number for number in range(1, 10) if not any(line.startswith(f"{number}. ") for line in lines)] == []
    assert "3. program: 23 operations on 12 levels" in lines
    assert "9. 7-sneaker.png: Sneaker, 96%" in lines
    assert sum(line.startswith("9. ") for line in lines) == 10
