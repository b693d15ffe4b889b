"""Where results that were measured are kept: by name and machine."""

from __future__ import annotations

import json

import torch
import worker

from parallel_parnet.commands.common import slug
from parallel_parnet.commands.depth.command import machine
from parallel_parnet.files import write_atomically


def record(name: str, result: dict) -> None:
    """Write results/<name>-<machine>.json."""
    here = machine(torch.device("cpu"))
    content = json.dumps({"machine": here, **result}, indent=1)
    write_atomically(worker.ROOT / "results" / f"{name}-{slug(here)}.json", content + "\n")
