"""Files that are whole or absent, never half written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import ParNetError


def write_atomically(path: Path | str, content: bytes | str) -> None:
    """Write beside the target, then rename over it; ParNetError where the folder cannot be written."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ParNetError(f"{path}: cannot be written ({error.strerror or error})") from None
