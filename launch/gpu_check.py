#!/usr/bin/env python
"""Probe, tune, prove and time the kernels on the GPU at hand: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("gpu-check")
