"""What a GPU check has measured, a JSON line for each row as soon as it is there: no later fault can take it back.

A line is {"step", "name", "values"}, or {"step", "verdict"} where a step has ended, or {"run"}: on what. Lines of a dry
run say so. Later lines replace earlier ones of the same name; one without values takes them back.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from parallel_parnet import ParNetError
from parallel_parnet.files import as_json, from_json, write_atomically

Values = dict


class Journal:
    """The file, which several processes may append to. note: goes into every line, if there is one."""

    def __init__(self, path: Path, note: str = "") -> None:
        self.path, self.note = path, note

    def begin(self, run: Mapping[str, object]) -> None:
        """Say what is measured on what, or hold this run to what the file says: rows of two GPUs, or of two states of
        the kernels, make no table. ParNetError where they differ."""
        lines = self._lines()
        started = next((line["run"] for line in lines if "run" in line), None)
        if started is None:
            self._append({"run": dict(run)})
            return
        for key, value in run.items():
            if started.get(key) != value:
                raise ParNetError(
                    f"{self.path}: its rows are of {key} {started.get(key)}, this is {value}: --fresh drops them, "
                    "another --out keeps them"
                )

    def add(self, step: str, name: str, values: Mapping[str, object]) -> None:
        """One more row."""
        self._append({"step": step, "name": name, "values": dict(values)})

    def end(self, step: str, verdict: Mapping[str, object]) -> None:
        """How a step ended."""
        self._append({"step": step, "verdict": dict(verdict)})

    def rows(self, step: str) -> dict[str, Values]:
        """Of a step, by name, in the order in which they were first measured."""
        found = [line for line in self._lines() if line.get("step") == step and "name" in line]
        return {name: values for name, values in {line["name"]: line["values"] for line in found}.items() if values}

    def results(self) -> dict[str, Values]:
        """Of each step that has begun: its verdict as far as there is one, and its rows, each with its name."""
        found: dict[str, Values] = {}
        for line in self._lines():
            if "step" in line:
                result = found.setdefault(line["step"], {"verdict": {}, "rows": {}})
                if "verdict" in line:
                    result["verdict"] = line["verdict"]
                else:
                    result["rows"][line["name"]] = line["values"]
        return {
            step: {
                "passed": False, "seconds": 0.0, **({} if result["verdict"] else {"fault": "interrupted"}),
                **result["verdict"],
                "rows": [{"name": name, **values} for name, values in result["rows"].items() if values],
            }
            for step, result in found.items()
        }  # fmt: skip

    def forget(self, steps: Collection[str]) -> None:
        """Drop all lines of these steps; with the last row goes what was measured on what."""
        kept = [line for line in self._lines() if line.get("step") not in steps]
        if not any("step" in line for line in kept):
            self.path.unlink(missing_ok=True)
        else:
            write_atomically(self.path, "".join(as_json(line) + "\n" for line in kept))

    def _append(self, line: Mapping[str, object]) -> None:
        marked = {**line, "note": self.note} if self.note else line
        try:
            with open(self.path, "ab+", buffering=0) as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                torn = file.read(1) not in (b"", b"\n")
                file.write(b"\n" * torn + as_json(marked).encode() + b"\n")  # in one write, at the end
        except OSError as error:
            raise ParNetError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _lines(self) -> list[Values]:
        if not self.path.exists():
            return []
        found = []
        for text in self.path.read_bytes().split(b"\n"):
            try:
                line = from_json(text)
            except ValueError:
                continue  # torn, by an end in the middle of a write; its row is measured again
            if isinstance(line, dict):
                found.append(line)
        return found
