"""ParNet with its streams really running in parallel. The public names, nothing else."""

from .checkpoint import load_checkpoint, save_checkpoint
from .engine import Engine
from .errors import LaneError, ParNetError, ParNetWarning
from .fold import fold
from .model import ParNet, create_model
from .placement import Placement
from .program import Program
from .variants import VARIANTS, Config

__all__ = [
    "VARIANTS", "Config", "Engine", "LaneError", "ParNet", "ParNetError", "ParNetWarning", "Placement", "Program",
    "create_model", "fold", "load_checkpoint", "save_checkpoint",
]  # fmt: skip
