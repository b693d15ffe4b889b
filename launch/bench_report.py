#!/usr/bin/env python
"""The benchmark's results as one figure and one page: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("bench-report")
