"""What every script here needs: the clone's package, which runs without an install."""

import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent
# last, since profile.py is not the standard library's; there at all, since what a script spawns runs it anew
sys.path = [str(LAUNCH.parent), *(path for path in sys.path if path != str(LAUNCH)), str(LAUNCH)]

try:
    from parallel_parnet.commands import start
except ModuleNotFoundError as error:
    sys.stderr.write(f"error: {sys.executable} lacks {error.name}: `make infer` once, then source .venv/bin/activate\n")
    sys.exit(2)

__all__ = ["start"]
