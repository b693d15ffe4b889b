#!/usr/bin/env python
"""Train on labelled pictures, from scratch or from a checkpoint: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("train")
