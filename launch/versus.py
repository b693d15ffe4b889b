#!/usr/bin/env python
"""Is ParNet really faster than ResNet, on this machine? `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("versus")
