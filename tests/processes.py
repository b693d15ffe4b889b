"""What tests ask of the system about processes."""

from __future__ import annotations

import socket
from pathlib import Path


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def children_of(pid: int) -> list[int]:
    """Processes whose parent it is, and orphans that it adopted; none of a process that is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    found = children_of(pid)
    return found + [grandchild for child in found for grandchild in descendants(child)]
