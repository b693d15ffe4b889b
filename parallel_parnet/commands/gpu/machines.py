"""The machine of a check: what it is, and what it reaches at best."""

from __future__ import annotations

import torch

from parallel_parnet.kernels.gpu.rates import Rates
from parallel_parnet.program.contract import dtype_name

from ..common import DTYPES
from .device import machine, measure_rates
from .journal import Values
from .precompile import Target
from .work import Work, verdict

RATED = ("bfloat16", "float16")


def check_machine(work: Work) -> Values:
    """What it is, and the rates of a large copy and of large products."""
    rows = [work.row("machine", lambda: machine(work.device))]
    for name in RATED:
        rows.append(work.row(f"rates, {name}", lambda dtype=DTYPES[name]: vars(measure_rates(work.device, dtype))))
    return verdict(rows)


def machine_of(work: Work) -> Values:
    """As the first step found it; looked at again where that did not run."""
    found = work.journal.rows("machine").get("machine", {})
    return found if "gpu" in found else machine(work.device)


def target_of(work: Work) -> Target:
    """What to compile for; in a dry run by nobody's table, and without launchers, which find no libcuda to link."""
    found, dry = machine_of(work), work.scope.dry
    return Target(tuple(found["capability"]), "" if dry else found["gpu"], not dry, found["multiprocessors"])


def rates_of(work: Work, dtype: torch.dtype) -> Rates:
    """As the first step measured them; measured again where that did not run."""
    found = work.journal.rows("machine").get(f"rates, {dtype_name(dtype)}", {})
    return Rates(**found) if found and "fault" not in found else measure_rates(work.device, dtype)
