"""What a user can cause and mend: launch scripts print these errors in one line and exit with status 2."""


class ParNetError(ValueError):
    """An error that says what is wrong with the user's input and what would be right, in one line, whatever names that
    quotes."""

    def __str__(self) -> str:
        said = super().__str__()
        return said if said.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in said)


class ParNetWarning(UserWarning):
    """A warning that says what is not as it could be; the answers are right."""


class LaneError(RuntimeError):
    """Raised where another lane died, hangs or cannot be reached; says what was under way."""
