"""ParNet with its streams really running in parallel. The public names, nothing else."""

from .engine import Engine
from .errors import LaneError, ParNetError, ParNetWarning
from .int8.quantize import quantize
from .network.blocks import ParNetBlock
from .network.checkpoint import load_checkpoint, save_checkpoint
from .network.features import Backbone
from .network.model import ParNet, create_model
from .network.variants import VARIANTS, Config
from .program.fold import fold
from .program.placement import Placement
from .program.program import Program

__all__ = [
    "VARIANTS", "Backbone", "Config", "Engine", "LaneError", "ParNet", "ParNetBlock", "ParNetError", "ParNetWarning",
    "Placement", "Program", "create_model", "fold", "load_checkpoint", "quantize", "save_checkpoint",
]  # fmt: skip
