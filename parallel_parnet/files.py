"""Files that are whole or absent, never half written."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import ParNetError

NO_UTF8 = "its name is no UTF-8, so that safetensors does not open it: give it another"
ALIGNED = 8  # bytes: what stands before the tensors' own in a .safetensors file is a multiple


def write_atomically(path: Path | str, content: bytes | str) -> None:
    """Write beside the target, then rename over it; ParNetError where the folder cannot be written.

    A file that is replaced keeps its permissions, a new one gets those that the process gives (umask). A link stays
    one, to a new file; devices and pipes, such as /dev/stdout, are written to: no file may replace them.
    """
    path = Path(path)
    # a name that is no UTF-8 is escaped, as in JSON and on the terminal: it costs no run its results
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            path.write_bytes(data)
            return
        target = Path(os.path.realpath(path))
        # with nothing of the target's name, which may be as long as names can be
        temporary = target.with_name(f".parnet-{secrets.token_hex(8)}.part")
        try:
            with os.fdopen(_opened(temporary), "wb") as file:
                if target.is_file():
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                if not temporary.exists():
                    # what is in /proc is a link, which Python follows only where it is told of a folder as well
                    own = f"/proc/self/fd/{file.fileno()}"
                    os.link(own, temporary, src_dir_fd=file.fileno(), follow_symlinks=True)
            os.replace(temporary, target)
        except BaseException:  # also what a signal's handler raises
            with suppress(OSError):
                temporary.unlink()
            raise
    except (OSError, ValueError) as error:  # the latter of a name with a zero byte
        raise ParNetError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


def _opened(temporary: Path) -> int:
    """Open a file without a name, which is gone with a process that is killed, where there can be one; else
    `temporary`."""
    if os.path.isdir("/proc/self/fd"):  # by which it gets a name later
        with suppress(OSError):
            return os.open(temporary.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    # no mkstemp, whose files are private: only by making one is the umask known, without setting it
    return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)


def check_writable(*paths: Path | str | None, reads: Iterable[Path | str | None] = ()) -> None:
    """Raise ParNetError, before any work is done, for the first of these files that `write_atomically` could not write,
    or that would take the place of one before it, or of one that the command reads; None is no file."""
    seen, read = set(), {os.path.realpath(path) for path in reads if path is not None}
    for path in paths:
        if path is None:
            continue
        if obstacle := _obstacle(path):
            raise ParNetError(f"{path}: cannot be written ({obstacle})")
        file = os.path.realpath(path)
        if file in read and os.path.isfile(file):
            raise ParNetError(f"{path}: is read as well: give what is written a name of its own")
        if file in seen:
            raise ParNetError(f"{path}: named twice: give each file a name of its own")
        if os.path.isfile(file) or not os.path.exists(file):  # a device or a pipe takes what there is
            seen.add(file)


def _obstacle(path: Path | str) -> str | None:
    if str(path) == "-":
        return "standard output is no file here; name one"
    if str(path).endswith(".safetensors") and not _is_utf8(path):
        return NO_UTF8
    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    regular = found is None or stat.S_ISREG(found.st_mode)
    if found and stat.S_ISDIR(found.st_mode):
        return "a folder; name a file"
    if found and regular and _takes_our_words(found):
        return "standard output or error goes to that file, which would be replaced; name another"
    folder = os.path.dirname(os.path.realpath(path))
    if regular and not os.path.isdir(folder):
        return "no such folder"
    return None if os.access(folder if regular else path, os.W_OK) else "not yours to write"


def _takes_our_words(file: os.stat_result) -> bool:
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(file, os.fstat(descriptor)):
                return True
    return False


def open_safetensors(path: Path | str) -> Any:
    """By which such a file is read, as torch's tensors; ParNetError for a name that the library does not take."""
    from safetensors import safe_open  # here, since it takes a while

    if not _is_utf8(path):
        raise ParNetError(NO_UTF8)
    return safe_open(path, "pt")


def _is_utf8(path: Path | str) -> bool:
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return False
    return True


def write_safetensors(path: Path | str, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write tensors, which are dense and share no memory, as a .safetensors file, atomically. Equal ones give equal
    bytes: the library itself writes metadata in an order of chance."""
    from safetensors.torch import save  # here, since it takes a while

    if not _is_utf8(path):  # and could not be opened again
        raise ParNetError(f"{path}: {NO_UTF8}")
    content = save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED)
    write_atomically(path, b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[end:])))


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as a JSON file, atomically."""
    write_atomically(path, as_json(value, indent=1) + "\n")


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows`, of one or more, as a CSV file with a heading, atomically; lists and dicts as JSON."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: as_json(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows)
    write_atomically(path, text.getvalue())


def as_json(value: Any, **layout: Any) -> str:
    """Write JSON that any parser takes: "nan" and "inf" are strings, since JSON has no such numbers. layout: options of
    json.dumps."""
    return json.dumps(_in_words(value), allow_nan=False, **layout)


def from_json(text: str | bytes) -> Any:
    """Read what `as_json` wrote, with its "nan" and "inf" as numbers again. ValueError where it is no JSON."""
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
