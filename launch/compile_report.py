#!/usr/bin/env python
"""What the compiler makes of every level, without a GPU: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("compile-report")
