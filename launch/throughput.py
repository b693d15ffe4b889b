#!/usr/bin/env python
"""What a batch costs: pictures a second and latency as it grows. `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("throughput")
