"""The parts of launch/bench.py."""

import common  # noqa: F401 (puts the package on the path)
