"""Forked processes: a fork copies memory, and none of the threads that compute in it. OpenMP's go on being waited for.

So a child computes on one thread from its first moment, whatever its parent did: also in torch's own operations, for
instance when a model is folded.
"""

from __future__ import annotations

import os
from functools import partial

import torch

IMPORTED_IN = os.getpid()

os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def is_forked() -> bool:
    """Whether this process is a fork of the one that imported the package."""
    return os.getpid() != IMPORTED_IN
