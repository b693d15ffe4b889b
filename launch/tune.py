#!/usr/bin/env python
"""Time kernel configurations on the GPU at hand, and keep the best: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("tune")
