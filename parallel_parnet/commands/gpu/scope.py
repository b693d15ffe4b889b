"""How much a GPU check runs, and on what: the networks on a GPU, or a narrow one in Triton's interpreter, as a dry run.

A dry run goes every step's way without a GPU, so that its first run on a GPU is not its first run. Kernels are
compiled under the stand-in for a driver and run by the interpreter; times are the host's clock, and mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallel_parnet import Config, ParNet, create_model
from parallel_parnet.kernels.gpu.config import HALF
from parallel_parnet.network.variants import variant
from parallel_parnet.parity import LIMIT

from .device import require_gpu

DTYPE = torch.bfloat16  # in which networks decide
DRY = "dry run, not measured on a GPU"
NARROW = "narrow"
CONFIGS = {NARROW: Config((8, 8, 16, 16), blocks=(1, 1, 1), num_classes=10, image_size=32)}


@dataclass(frozen=True)
class Scope:
    """note: what every row and page of a dry run says, else nothing.

    decisive: networks that decide the design; timed: tuned and timed, in this order; variants, dtypes, batches: of the
    full parity; used: through the engine; kernels, levels, candidates: at most.
    lanes: of the engines; repeats: runs whose bits are compared, of these networks and batches; rounds: of contenders
    in turns.
    """

    note: str
    decisive: tuple[str, ...]
    timed: tuple[str, ...]
    variants: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    batches: tuple[int, ...]
    used: tuple[str, ...]
    repeated: tuple[tuple[str, int], ...]
    repeats: int
    lanes: tuple[int, ...]
    rounds: int
    kernels: int
    levels: int
    candidates: int

    @property
    def dry(self) -> bool:
        """Whether it is a dry run."""
        return self.note != ""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else require_gpu()

    def limit(self, dtype: torch.dtype) -> float:
        """The relative error up to which one picture's logits pass. So narrow a network as a dry run's loses more of
        bf16's digits: of one picture in fifty more than LIMIT, by torch too."""
        return LIMIT[dtype] * (4 if self.dry else 1)


ON_A_GPU = Scope(
    note="", decisive=("parnet_s", "parnet_xl"), timed=("parnet_s", "parnet_xl", "parnet_l", "parnet_m"),
    variants=("parnet_s", "parnet_xl", "parnet_l", "parnet_m", "parnet_cifar_1m", "parnet_fashion"),
    dtypes=(*HALF, torch.float32), batches=(1, 4), used=("parnet_fashion", "parnet_s"),
    repeated=(("parnet_s", 1), ("parnet_xl", 1), ("parnet_xl", 4)), repeats=1000,
    lanes=(1, 3), rounds=10,
    kernels=1000, levels=1000, candidates=24,
)  # fmt: skip

IN_A_DRY_RUN = Scope(
    note=DRY, decisive=(NARROW,), timed=(NARROW,), variants=(NARROW,), dtypes=(DTYPE,),
    batches=(1,), used=(NARROW,), repeated=((NARROW, 1),), repeats=1, lanes=(1,), rounds=1,
    kernels=1, levels=2, candidates=2,
)  # fmt: skip


def scope(dry: bool) -> Scope:
    return IN_A_DRY_RUN if dry else ON_A_GPU


def config(name: str) -> Config:
    """Of a variant, or of the dry run's network."""
    return CONFIGS.get(name) or variant(name)


def model(name: str) -> ParNet:
    """With random weights as torch initialises them."""
    return create_model(config(name))
