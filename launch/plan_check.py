#!/usr/bin/env python
"""The planner's predictions against this machine: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("plan-check")
