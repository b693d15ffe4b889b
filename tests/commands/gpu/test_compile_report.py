"""The compile report's second tables: which levels they have, and what of. Compiling is left out."""

from __future__ import annotations

import json

import pytest

from parallel_parnet.commands.gpu import compile_report
from parallel_parnet.commands.gpu.precompile import shapes_of
from parallel_parnet.kernels.gpu.compiled import Resources
from parallel_parnet.kernels.gpu.config import CONFIGS

PROGRAM = shapes_of("parnet_s")  # made while modules load, before a fixture fills new tensors
TIMED = json.loads((CONFIGS / "warpgroups.NVIDIA_H200.json").read_text())["levels"]


def test_the_levels_of_the_kernel_for_warpgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    def resources(source):
        return Resources(
            64, source.threads, source.shared, 0, 0, 8, 0, False, 1000, dict.fromkeys(("HGMMA", "QGMMA", "LDGSTS"), 0)
        )

    monkeypatch.setattr(compile_report, "resources_for_warpgroups", resources)
    rows = compile_report.compile_for_warpgroups(PROGRAM)
    assert [row.name for row in rows] == [f"level {number}" for number in range(2, 12)]
    assert {row.timed for row in rows} <= {level["us"] for level in TIMED.values()}
    assert all(0.7 < row.model.seconds * 1e6 / row.timed < 1.4 for row in rows)
    data = compile_report.figures_of_warpgroups(rows)
    assert data["launches"] == 10 and data["spilled_bytes"] == 80
    assert data["timed_us"] == pytest.approx(sum(row.timed for row in rows), abs=0.1)
    assert data["least_us"] < data["modelled_us"]
    page = compile_report.section("###", rows, "timed, us", compile_report.sums_of_warpgroups(data)).splitlines()
    lines = [line.split("|")[1:-1] for line in page if line.startswith("| level")]
    assert len(lines) == 11 and len({len(line) for line in lines}) == 1
    assert [float(line[-1]) for line in lines[1:]] == [row.timed for row in rows]
