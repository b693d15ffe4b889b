#!/usr/bin/env python
"""Nsight, and what a trace says about where the time goes: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("profile")
