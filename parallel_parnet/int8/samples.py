"""What values a program's features take on pictures: a random sample of each, and how far it reaches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..engine import Engine
from ..errors import ParNetError
from ..program.placement import Placement
from ..program.program import Program

SEED = 0  # of which values are sampled
PER_PICTURE = 1 << 14  # values of a feature that are kept
MOST = 1 << 16  # values of a feature; beyond, every second one goes, by chance, and fewer of each further picture come
PIXELS = 1 << 20  # of pictures that are computed at once, since all their features are there together


class Sample:
    """Values of one feature, fp32 on the CPU, in which every picture has about the same part."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator, self._each = generator, float(PER_PICTURE)
        self._kept: list[Tensor] = []
        self.low = self.high = 0.0
        self.largest = torch.zeros((), dtype=torch.float32, device="cpu")  # of each channel, once there are any

    @property
    def values(self) -> Tensor:
        """The values kept, fp32 [values], once there are any."""
        return torch.cat(self._kept)

    def add(self, feature: Tensor) -> None:
        """Take a random choice of the values of a feature [N, C, H, W], its ends, and what each channel reaches."""
        self.largest = torch.maximum(self.largest, feature.abs().amax((0, 2, 3)).cpu())
        flat = feature.flatten()
        least, most = flat.aminmax()
        self.low, self.high = min(self.low, least.item()), max(self.high, most.item())
        count = max(1, round(self._each * len(feature)))
        places = torch.randint(len(flat), (count,), generator=self._generator, device="cpu")
        self._kept.append(flat[places.to(flat.device)].cpu())
        while (total := sum(map(len, self._kept))) > MOST:
            half = torch.randperm(total, generator=self._generator, device="cpu")[: total // 2]
            self._kept, self._each = [self.values[half]], self._each / 2


def sample(
    program: Program, features: Sequence[str], pictures: Iterable[Tensor] | Tensor, seed: int = SEED
) -> dict[str, Sample]:
    """Sample each of the features, as the executor reference computes them, on pictures as `Engine` takes them.

    Memory is bounded, however many pictures there are; they are computed on their device, some at a time. ParNetError
    where there are none, and for pictures or features with non-finite values (NaN or inf).
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    found = {name: Sample(generator) for name in features}
    whole = replace(program, outputs={name: name for name in features}, original=program)
    engine: Engine | None = None
    for x_nchw in some_at_a_time(pictures):
        engine = engine or Engine(whole, Placement.single(whole), x_nchw.device, executor="reference")
        answer = engine(x_nchw)
        assert isinstance(answer, dict)
        for name, feature in answer.items():
            if not bool(feature.isfinite().all()):
                raise ParNetError(f"feature {name!r} holds non-finite values (NaN or inf) on these pictures")
            found[name].add(feature)
    if engine is None:
        raise ParNetError("no pictures for calibration: give some like those that the network will see")
    return found


def some_at_a_time(pictures: Iterable[Tensor] | Tensor) -> Iterator[Tensor]:
    """Cut pictures into batches small enough for all features of a program to be in memory. ParNetError for what is no
    pictures, and for non-finite ones (NaN or inf)."""
    for batch in [pictures] if isinstance(pictures, Tensor) else pictures:
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            raise ParNetError("pictures for calibration: give a tensor [N, 3, H, W], or several of them one by one")
        if batch.is_floating_point() and not bool(batch.isfinite().all()):
            raise ParNetError("the pictures for calibration hold non-finite values (NaN or inf)")
        yield from batch.split(max(1, PIXELS // max(1, batch.shape[2] * batch.shape[3])))
