"""Two processes test the kernels: `TRITON_INTERPRET=1 pytest tests/kernels` interprets, without it they are compiled.

Triton reads the variable when it is imported. Files named test_interpreter* belong to the first process, test_compile*
to the second. KERNEL_TESTS=all runs every case, not a sample.
"""

from __future__ import annotations

import os

import pytest
import torch

from cases import ALL

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = ["test_compile*"] if INTERPRETING else ["test_interpreter*"]

if INTERPRETING:
    from parallel_parnet.kernels.gpu import interpreter

    interpreter.install()
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    return f"kernels: {'every case' if ALL else 'a sample of the cases'}"


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every new tensor with NaN, or with a large number, so that reading it shows."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        if tensor.device.type == "meta":
            return tensor
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2)

    monkeypatch.setattr(torch, "empty", poisoned)
