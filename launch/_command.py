"""What every script here needs: the clone's package, which runs without an install."""

import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent
# last, since profile.py is not the standard library's; there at all, since what a script spawns runs it anew
sys.path = [str(LAUNCH.parent), *(path for path in sys.path if path != str(LAUNCH)), str(LAUNCH)]

from parallel_parnet.commands import start  # noqa: E402

__all__ = ["start"]
