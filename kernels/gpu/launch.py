"""A kernel launch, prepared: nothing is computed, checked or allocated when it runs, so that a graph can hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FUSED = {"enable_fp_fusion": True}  # products and sums in one, as kernels were timed; Triton's default is to change


@dataclass(frozen=True, eq=False)
class Launch:
    """A Triton kernel with all its arguments. Tensors on torch's "meta" device serve to compile without a GPU."""

    name: str
    kernel: Any
    arguments: tuple[Any, ...]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int

    def __call__(self) -> None:
        """Start it on the current CUDA stream."""
        self.kernel[self.grid](*self.arguments, **self._options)

    def compile(self) -> Any:
        """Compile for the active driver's GPU, exactly as a call would, and start nothing."""
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **FUSED}
