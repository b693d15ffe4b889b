"""Passes of the CPU kernels, and what lies in their memory."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel_parnet import Engine, Placement, Program
from parallel_parnet.executors.native_feature import Feature
from parallel_parnet.executors.native_plan import NativePlan
from parallel_parnet.executors.segment import SegmentModule


def reference(program: Program, x: Tensor) -> Tensor:
    return Engine(program, device="cpu", executor="reference")(x)


def plan_of(
    program: Program, shape: tuple[int, ...], threads: int = 1, dtype: torch.dtype = torch.float32
) -> NativePlan:
    (segment,) = Placement.single(program).segments(program)
    module = SegmentModule(program, segment, torch.float32, torch.device("cpu"))
    return NativePlan(module, [shape], threads, dtype)


def features(plan: NativePlan) -> list[Feature]:
    return [kept for kept in plan._kept if isinstance(kept, Feature)]


def poison(plan: NativePlan) -> None:
    """NaN wherever a task must write before another reads, in features of 8 bits the largest number."""
    for feature in features(plan):
        for padded in (feature.padded, feature.fp32):
            edge = feature.edge
            padded[:, edge:-edge, edge:-edge] = torch.nan if padded.is_floating_point() else 255
        if feature.sums is not None:
            feature.sums.fill_(torch.nan)
    for kept in plan._kept:
        if isinstance(kept, Tensor) and kept.dtype == torch.float32:
            kept.fill_(torch.nan)
        elif isinstance(kept, Tensor) and kept.dtype == torch.uint8:  # scratch, where it makes NaN of any type
            kept.fill_(255)
    for logits in plan._logits.values():
        logits.fill_(torch.nan)


def borders_are_zeros(plan: NativePlan) -> bool:
    """Still, or what stands for zeros: around all features, and behind the channels of each pixel."""
    for feature in features(plan):
        n, h, w, c = feature.padded.shape
        behind = feature.padded.as_strided((n, h, w, feature.pitch), (*feature.padded.stride()[:3], 1))[..., c:]
        if behind.any():
            return False
    borders = [(feature.padded.clone(), feature.edge, feature.zero) for feature in features(plan)]
    for border, edge, zero in borders:
        border[:, edge:-edge, edge:-edge] = zero
    return all((border == zero).all() for border, _, zero in borders)
