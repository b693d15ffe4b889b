"""What every script here needs: the clone's package, which runs without an install."""

import os
import sys
from contextlib import suppress
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent
# last, since profile.py is not the standard library's; there at all, since what a script spawns runs it anew
sys.path = [str(LAUNCH.parent), *(path for path in sys.path if path != str(LAUNCH)), str(LAUNCH)]

try:
    from parallel_parnet.commands import start
except ModuleNotFoundError as error:
    said = f"error: {sys.executable} lacks {error.name}: `make infer` once, then source .venv/bin/activate\n"
    with suppress(OSError):  # standard error may be closed, or its disk full
        os.write(2, os.fsencode(said))
    sys.exit(2)
except KeyboardInterrupt:  # as `run` ends, which there is not yet: what the package imports takes a second or two
    sys.exit(130)

__all__ = ["start"]
