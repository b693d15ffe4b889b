"""The time that control groups grant, and how many threads an engine takes for it."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parallel_parnet import Engine, fold
from parallel_parnet.cores import cores, quotas
from parallel_parnet.executors import torch_backend
from small import OPTIONAL, SMALL, lively


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


@pytest.mark.parametrize(("granted", "count"), [(0.5, 1), (1.5, 1), (2.0, 2), (64.0, 8)])
def test_whole_cores_are_counted_and_one_at_least(granted: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("parallel_parnet.cores.quotas", lambda: [granted])
    assert cores() == count


def test_what_may_not_be_read_grants_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the time of control groups nor the cores that are bound."""

    def refused(*_: object) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "cgroup").write_text("0::/\n")
    monkeypatch.setattr(os, "sched_getaffinity", refused)
    monkeypatch.setattr(Path, "stat", refused)
    assert cores() == min([os.cpu_count() or 1, *map(math.floor, quotas())])
    monkeypatch.setattr(Path, "read_bytes", refused)
    assert cores() == (os.cpu_count() or 1)


def test_a_control_group_whose_name_is_no_text(tmp_path: Path) -> None:
    group = tmp_path / os.fsdecode(b"g\xff")
    group.mkdir()
    (group / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "cgroup").write_bytes(b"0::/g\xff\n")
    assert list(quotas(tmp_path, tmp_path / "cgroup")) == [1.5]


@pytest.mark.parametrize("executor", OPTIONAL)
def test_an_engine_takes_no_more_threads_than_it_is_granted_cores(
    executor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor asks at each call."""
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "cgroup").write_text("0::/\n")
    asked, taken = [], set[int]()

    def granted() -> list[float]:
        asked.append(1)
        return list(quotas(tmp_path, tmp_path / "cgroup"))

    monkeypatch.setattr("parallel_parnet.cores.quotas", granted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name in ("NativePlan", "_openvino"):
        made = getattr(torch_backend, name)

        def kept(module: object, reads: object, *rest: object, made: Callable = made) -> object:
            taken.update(number for number in rest if isinstance(number, int))
            return made(module, reads, *rest)

        monkeypatch.setattr(torch_backend, name, kept)
    program, x = fold(lively(SMALL, 9)), torch.randn(1, 3, 32, 32)
    engine = Engine(program, device="cpu", executor=executor)
    engine(x)
    assert taken == {1}
    often = len(asked)
    engine(x)
    assert len(asked) == often
    chosen = Engine(program, device="cpu")
    assert all("of 1 thread(s)" in name for name in chosen.warm_up(x))
    chosen.save(tmp_path / "engine.safetensors")
    assert Engine.load(tmp_path / "engine.safetensors").threads == 1 and taken == {1}
