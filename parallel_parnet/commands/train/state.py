"""A run in the middle of training, in a file from which it goes on as if nothing had happened."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

from parallel_parnet import ParNetError
from parallel_parnet.files import write_atomically


def beside(out: Path) -> Path:
    """Where the state of a run lies that is to write `out`."""
    return out.with_name(f"{out.name}.state")


def write(path: Path, state: dict[str, Any]) -> None:
    """Tensors and plain values, whole or not at all; ParNetError where they cannot be written."""
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(path, content.getvalue())


def read(path: Path, settings: str) -> dict[str, Any] | None:
    """What `write` kept, nothing where there is no file; ParNetError for another run's, or a damaged one."""
    if not os.path.exists(path):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        made_with = state["settings"]
    except Exception as error:  # whatever damage leads an unpickler to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ParNetError(f"{path}: no state of a training run ({reason}); remove it to begin anew") from None
    if made_with != settings:
        raise ParNetError(
            f"{path}: a run with other settings or pictures, or on another kind of device, stopped here; give those, "
            f"or remove it to begin anew"
        )
    return state
