"""Files that are whole or absent, never half written."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import ParNetError


def write_atomically(path: Path | str, content: bytes | str) -> None:
    """Write beside the target, then rename over it; ParNetError where the folder cannot be written.

    A link stays one, to a new file; devices and pipes, such as /dev/stdout, are written to: no file may replace them.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            path.write_bytes(data)
            return
        target = Path(os.path.realpath(path))
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ParNetError(f"{path}: cannot be written ({error.strerror or error})") from None


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as a JSON file, atomically."""
    write_atomically(path, as_json(value, indent=1) + "\n")


def as_json(value: Any, **layout: Any) -> str:
    """As any parser takes it: "nan" and "inf" are words, since JSON has no such numbers. layout: as of json.dumps."""
    return json.dumps(_in_words(value), allow_nan=False, **layout)


def from_json(text: str | bytes) -> Any:
    """What `as_json` wrote, with its "nan" and "inf" as numbers again. ValueError where it is no JSON."""
    return _in_numbers(json.loads(text))


def _in_words(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_words(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_words(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _in_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else value
