#!/usr/bin/env python
"""A network in int8: its calibration, and what each operation costs: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("quantize")
