#!/usr/bin/env python
"""The fastest placement on so many GPUs, its schedule, and why: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("plan")
