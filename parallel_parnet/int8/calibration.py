"""A program's calibration as a small file: the ranges of its features, which give the same int8 program again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ParNetError
from ..files import write_json
from ..program.contract import LEAST_STEP, MOST_STEP
from ..program.program import Program
from .kernels import in_int8
from .ranges import LEVELS, Range

FORMAT = "parallel_parnet.calibration.1"


@dataclass(frozen=True)
class Calibration:
    """The numbers that stand for a program's features, and the operations that stay in fp32.

    program, quantised: digests of the fp32 program that it is for, and of what it makes of it. made: from what, for
    people.
    """

    program: str
    quantised: str
    keep: tuple[str, ...]
    features: Mapping[str, Range]
    made: Mapping[str, Any]

    @classmethod
    def of(
        cls, program: Program, features: Mapping[str, Range], keep: tuple[str, ...], made: Mapping[str, Any]
    ) -> Calibration:
        """Make a calibration for `program`. features: the range of each by name; keep: operations that stay in fp32."""
        return cls(program.digest, in_int8(program, features, keep).digest, keep, features, made)

    def applied(self, program: Program) -> Program:
        """Return the int8 program that the calibration was made with, to the bit. ParNetError where `program` is not
        the one it is for, or this version would make another int8 program of it."""
        if program.digest != self.program:
            raise ParNetError("a calibration of another network, or of other weights: give pictures to calibrate with")
        made = in_int8(program, self.features, self.keep)
        if made.digest != self.quantised:
            raise ParNetError("a calibration of another version, which rounds weights otherwise: calibrate again")
        return made

    def save(self, path: Path | str) -> None:
        """Write as JSON, atomically."""
        features = {name: chosen._asdict() for name, chosen in self.features.items()}
        write_json(path, {"format": FORMAT, **asdict(self), "features": features})

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Read what `save` wrote; ParNetError, naming the file, where it is missing, damaged or foreign."""
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            if fields.pop("format") != FORMAT:
                raise ValueError("another format")
            features = {name: Range(**numbers) for name, numbers in fields.pop("features").items()}
            found = cls(keep=tuple(fields.pop("keep")), features=features, **fields)
            if wrong := [name for name, chosen in features.items() if not _is_range(chosen)]:
                raise ValueError(f"step or zero of {wrong[0]!r}")
            if not all(isinstance(text, str) for text in (found.program, found.quantised, *found.keep)):
                raise ValueError("a digest or a name that is no text")
        except OSError as error:
            raise ParNetError(f"{path}: cannot be read ({error.strerror})") from None
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ParNetError(f"{path}: no calibration ({error!r}): launch/quantize.py writes one") from None
        return found


def _is_range(chosen: Range) -> bool:
    """Whether step and zero have the right types, are within their limits, and the step is an fp32 number."""
    step, zero = chosen
    if type(step) is not float or type(zero) is not int or not 0 <= zero <= LEVELS or not math.isfinite(step):
        return False
    return LEAST_STEP <= step <= MOST_STEP and torch.tensor(step, dtype=torch.float32, device="cpu").item() == step
