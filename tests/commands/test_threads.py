"""How many threads a command takes, and the time that control groups grant it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel_parnet import ParNetError
from parallel_parnet.commands.ranks import Ranks, quotas


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(0, 1, 0, 1)
    monkeypatch.setattr("parallel_parnet.commands.ranks.cores", lambda: 6)
    for asked, wanted, threads in ((None, None, 6), ("3", None, 3), ("3", 2, 2), ("many", None, 6), ("0", None, 6),
                                   ("99999", None, 6), ("9" * 5000, None, 6)):  # fmt: skip
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if asked is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert ranks.take_threads(wanted) == torch.get_num_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Ranks(1, 3, 1, 3).take_threads() == 2, "torchrun sets it to 1 where nobody did"
    for wanted in (0, 99999):
        with pytest.raises(ParNetError, match=f"--threads {wanted}"):
            ranks.take_threads(wanted)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/user/task\n", {"user/cpu.max": "150000 100000", "user/task/cpu.max": "max 100000"}, [1.5]),
        ("0::/\n", {"cpu.max": "50000 100000"}, [0.5]),
        ("0::/\n", {}, []),
        ("3:memory:/a\n2:cpu,cpuacct:/a\n", {
            "cpu,cpuacct/a/cpu.cfs_quota_us": "300000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000",
        }, [3.0]),
    ],
)  # fmt: skip
def test_time_that_control_groups_grant(membership: str, files: dict, expected: list, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(content + "\n")
    (tmp_path / "cgroup").write_text(membership)
    assert list(quotas(tmp_path / "fs", tmp_path / "cgroup")) == expected
