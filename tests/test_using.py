"""What docs/using.md and docs/distributed.md show in Python runs as written, and prints what its comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import ROOT, launch

PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
PROGRAMS = PYTHON.findall((ROOT / "docs" / "using.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("code", PROGRAMS, ids=["rival", "int8", "backbone", "block"])
def test_an_example(code: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(code, "docs/using.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)


def test_the_example_of_ranks(tmp_path: Path) -> None:
    (code,) = PYTHON.findall((ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"))
    script = tmp_path / "ranks.py"
    script.write_text(code)
    run = launch(script, ranks=3, anew=True, environment={"PYTHONPATH": str(ROOT)})
    assert run.stdout.splitlines() == re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE) == ["Sneaker"]
