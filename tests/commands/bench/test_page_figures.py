"""What the pages say of ours and the best other library is what the results say."""

from __future__ import annotations

import json
import re

from conftest import ROOT
from parallel_parnet.commands.bench.rows import TELLING, compared

PAGE = ROOT / "docs" / "performance.md"
CELL = re.compile(
    r"\[([\d.]+)\]\((\S+/bench-infer-\S+\.json)\), ([\w ]+?) ([\d.]+): \*\*([\d.]+)\*\* \(([\d.]+) to ([\d.]+)\)"
    r"(, few runs)?"
)
SHORT_CELL = re.compile(r"\| ([\d.]+), ([\w ]+?) ([\d.]+): \*\*([\d.]+)\*\*(?= \|)")


def test_the_table_against_the_others() -> None:
    cells = CELL.findall(PAGE.read_text(encoding="utf-8"))
    assert len(cells) == 40, "five networks in three types, in two on another machine, and in three on a third"
    for ours, path, peer, theirs, *ratios, few in cells:
        rows = json.loads((PAGE.parent / path).read_text())["rows"]
        mine, other = compared(rows, ours=True), compared(rows, ours=False)
        assert mine and other and other["contender"].split(",")[0] == peer, path
        assert bool(few) == (min(mine["n"], other["n"]) < TELLING), path
        for said, row in ((ours, mine), (theirs, other)):
            assert float(said) == float(f"{row['infer_step_time']:.{len(said.split('.')[1])}f}"), path
        assert ratios == [f"{value:.2f}" for value in other["ratio"]], path


def test_the_readme_has_the_same() -> None:
    """Three of the page's five networks, each in all three types."""
    cells = CELL.findall(PAGE.read_text())
    page = [(ours, peer, theirs, ratio) for ours, path, peer, theirs, ratio, *_ in cells if "avx512" in path]
    short = SHORT_CELL.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(short) == 9 and short == [cell for cell in page if cell in short]
