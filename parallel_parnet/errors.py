"""The one exception that a user can cause and mend: launch scripts print it in one line and exit with status 2."""


class ParNetError(ValueError):
    """Says what is wrong with the user's input and what would be right."""


class ParNetWarning(UserWarning):
    """Says what is not as it could be; the answers are right."""


class LaneError(RuntimeError):
    """Another lane died, hangs or cannot be reached; says what was under way."""
