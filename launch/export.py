#!/usr/bin/env python
"""The folded network as a file for other libraries, checked before it is put in place: `--help` tells the rest."""

from _command import start

if __name__ == "__main__":
    start("export")
