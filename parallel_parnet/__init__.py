"""ParNet with its streams really running in parallel. The public names, nothing else."""

from .engine import Engine
from .errors import LaneError, ParNetError, ParNetWarning
from .int8.quantize import quantize
from .network.blocks import ParNetBlock, fold_blocks
from .network.checkpoint import load_checkpoint, save_checkpoint
from .network.features import Backbone
from .network.model import ParNet, create_model
from .network.variants import VARIANTS, Config, list_models
from .preprocess import Preprocess
from .program.fold import fold
from .program.placement import Placement
from .program.program import Program
from .transport import join_ranks, leave_ranks

__all__ = [
    "VARIANTS", "Backbone", "Config", "Engine", "LaneError", "ParNet", "ParNetBlock", "ParNetError", "ParNetWarning",
    "Placement", "Preprocess", "Program", "create_model", "fold", "fold_blocks", "join_ranks", "leave_ranks",
    "list_models", "load_checkpoint", "quantize", "save_checkpoint",
]  # fmt: skip
