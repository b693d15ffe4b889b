"""What a user can cause and mend: launch scripts print these errors in one line and exit with status 2."""

import sys
import warnings
from functools import cache

PACKAGE = __name__.partition(".")[0] + "."


class ParNetError(ValueError):
    """An error that says what is wrong with the user's input and what would be right, in one line, whatever names that
    quotes."""

    def __str__(self) -> str:
        said = super().__str__()
        return said if said.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in said)


class ParNetWarning(UserWarning):
    """A warning that says what is not as it could be, or not as somebody may think that it is."""


class LaneError(RuntimeError):
    """Raised where another lane died, hangs or cannot be reached; says what was under way."""


@cache  # once for a process, from wherever its engines are made
def warn(note: str) -> None:
    """Warn (ParNetWarning) of the caller's line, outside of this package, once a process for each note."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals["__name__"].startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(note, ParNetWarning, stacklevel=level)
