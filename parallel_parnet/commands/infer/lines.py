"""A JSON Lines file of answers that survives the death of its writer: each picture once, whole lines, one writer."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from pathlib import Path

from parallel_parnet import ParNetError
from parallel_parnet.files import as_json

from ..locking import lock

START = b'{"image": '
SYNC_S = 1.0


def stamp(*basis: object) -> str:
    """Stands for all that answers depend on."""
    return hashlib.sha256(json.dumps(basis).encode()).hexdigest()[:16]


class AnswerLines:
    """Objects {"image": ..., ..., "settings": ...}, one a line, appended by one write each.

    `settings`, a `stamp`, names what the answers depend on. It stands in every line, so that no second file can be lost
    or disagree. `done` holds the pictures that had an answer when the file was opened, `failed` those with a "reason"
    instead: they may be tried again, and get a second line where they then have an answer. A last line without its
    end is what a writer left that died in the middle of it: it is cut off, and the picture counts as not done.

    What was appended survives the process at once, and the machine after at most SYNC_S seconds of further appending
    or `close`. Raises ParNetError where the file is another run's, another program's, or cannot be written; it then
    still holds whole lines only.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self.settings = path, settings
        self.done: set[str] = set()
        self.failed: set[str] = set()
        self._synced = time.monotonic()
        if str(path) == "-":
            raise ParNetError("-: standard output is no file that can be continued; name one")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise ParNetError(f"{path}: not a regular file, which what goes on where it stopped needs")
            lock(self._file, path)
            self._end = self._read_back()
            os.ftruncate(self._file, self._end)
        except OSError as error:
            os.close(self._file)
            raise self._unwritable(error) from None
        except ParNetError:
            os.close(self._file)
            raise

    def append(self, image: str, answer: dict) -> None:
        """Write one picture's line."""
        line = as_json({"image": image, **answer, "settings": self.settings}).encode() + b"\n"
        try:
            written = os.write(self._file, line)
            while written < len(line):  # a disk that is nearly full takes a part, and refuses the rest
                written += os.write(self._file, line[written:])
            self._end += len(line)
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Cut off what is not a whole line, and wait until the rest is on the disk."""
        try:
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            os.close(self._file)

    def __enter__(self) -> AnswerLines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_back(self) -> int:
        """Fill `done` and `failed`; returns where the last whole line ends."""
        end = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and START.startswith(line[: len(START)]):
                    break
                self._check(number, line)
                end += len(line)
        return end

    def _check(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            image, settings = row["image"], row["settings"]
            if not isinstance(image, str):
                raise TypeError(image)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ParNetError(f"{self.path}: line {number} is no answer of this command; give another file") from None
        if settings != self.settings:
            raise ParNetError(
                f"{self.path}: line {number} was made with another network, picture size, precision, crops, labels or "
                f"data; give those, or another file"
            )
        if image in self.done or (image in self.failed and "reason" in row):
            raise ParNetError(f"{self.path}: line {number} has {image} a second time; give another file")
        (self.failed if "reason" in row else self.done).add(image)

    def _unwritable(self, error: OSError) -> ParNetError:
        return ParNetError(f"{self.path}: cannot be written ({error.strerror})")
