"""What docs/using.md shows in Python runs as written, and prints what its comments say."""

from __future__ import annotations

import re

import pytest

from conftest import ROOT

PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "using.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", PROGRAMS, ids=["rival", "int8", "backbone", "block"])
def test_an_example(code: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(code, "docs/using.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
