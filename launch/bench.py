#!/usr/bin/env python
"""Time every executor and every installed peer side by side: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("bench")
