#!/usr/bin/env python
"""Does latency follow depth, or work? the experiment: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("latency-vs-depth")
