#!/usr/bin/env python
"""What a batch costs: pictures a second and latency as it grows. `--help` tells the rest."""

import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent  # whose profile.py is not the standard library's
sys.path = [str(LAUNCH.parent), *(path for path in sys.path if path != str(LAUNCH))]  # runs without an install

from parallel_parnet.commands import start  # noqa: E402

if __name__ == "__main__":
    start("throughput")
