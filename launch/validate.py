#!/usr/bin/env python
"""Top-1 and top-5 of a checkpoint on labelled pictures: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("validate")
