#!/usr/bin/env python
"""Classify pictures, and tell the latency: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("infer")
