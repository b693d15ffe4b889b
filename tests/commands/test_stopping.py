"""How a command ends by a signal."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import in_python


@pytest.mark.parametrize("ignored", ["SIGINT", "SIGHUP"])
def test_an_inherited_ignore_stays(ignored: str, tmp_path: Path) -> None:
    """As a shell leaves SIGINT for what runs in the background, and nohup SIGHUP."""
    code = (
        f"import signal; signal.signal(signal.{ignored}, signal.SIG_IGN);"
        "from parallel_parnet.commands.stopping import stop_on_signals; stop_on_signals();"
        f"print(signal.getsignal(signal.{ignored}) is signal.SIG_IGN, callable(signal.getsignal(signal.SIGTERM)))"
    )
    assert in_python(code, tmp_path).stdout.split() == ["True", "True"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [("raise ParNetError('wrong')", 2, ""), ("return 0", 143, "rank 1 was stopped by SIGTERM\n")],
    ids=["at fault", "done"],
)
def test_a_rank_that_is_ended_while_it_leaves_the_others(body: str, status: int, said: str, tmp_path: Path) -> None:
    """By torchrun, once rank 0 has said what is wrong with the input."""
    code = f"""
import signal
from parallel_parnet import ParNetError
from parallel_parnet.commands import ending, stopping

def main():
    {body}

stopping.stop_on_signals()
ending.leave_ranks = lambda: signal.raise_signal(signal.SIGTERM)
ending.run(main)
"""
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert in_python(code, tmp_path, environment=ranks, status=status).stderr == said
