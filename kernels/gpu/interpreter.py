"""Makes Triton's interpreter as strict as a GPU: `install`, in a process that was started with TRITON_INTERPRET=1.

* bfloat16 is computed as such. Triton 3.6 keeps it as bit patterns in uint16 and multiplies those.
* e4m3 is converted as a GPU does it: what is larger than the largest number becomes that, and what is none stays none.
* Every lane that is not masked must lie inside a tensor argument.
* Within a launch, no program may read or overwrite what another wrote, unless an acquire saw the other's release: the
  programs' happens-before order is kept as in a vector clock, so an atomic that is too weak is found out although the
  interpreter runs one program after the other.
* Programs may be run in any order: `run_order`. Those that others wait for, as many as a kernel's argument `leaders`
  says, keep their place before the others, as on a GPU; a wait for a program that has not run is an error.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, interpreter_builder

ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide, np.minimum, np.maximum, np.less, np.greater)


class Memory:
    """The tensor arguments of one launch: who wrote each byte, and whose writes each program may rely on."""

    def __init__(self, arguments: Any) -> None:
        self.regions: dict[int, np.ndarray] = {}  # first address -> writer of each byte, -1 for none
        self.seen: dict[int, set[int]] = {}  # program -> programs whose writes it has acquired
        self.released: dict[int, set[int]] = {}  # address of an atomic -> programs whose writes it hands on
        self.asked: tuple[int, int] | None = None  # program and address, where the last atomic changed nothing
        self._add(arguments)

    def _add(self, argument: Any) -> None:
        if isinstance(argument, tuple | list):
            for part in argument:
                self._add(part)
        elif hasattr(argument, "data_ptr"):
            size = argument.numel() * argument.element_size()
            self.regions.setdefault(argument.data_ptr(), np.full(size, -1, np.int32))

    def access(self, program: int, pointers: TensorHandle, mask: TensorHandle | None, kind: str) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.asarray(pointers.data)
        left = addresses[np.broadcast_to(mask.data != 0, addresses.shape)] if mask is not None else addresses
        left = left.ravel().astype(np.int64)
        if not left.size:
            return
        lowest, highest = left.min(), left.max()
        for first, writers in self.regions.items():
            if highest < first or lowest >= first + len(writers):
                continue
            inside = (left >= first) & (left + size <= first + len(writers))
            cells = left[inside] - first
            owners = writers[cells]
            others = owners[(owners >= 0) & (owners != program)]
            if others.size and not self.seen.get(program, set()).issuperset(others.tolist()):
                raise RuntimeError(f"race: {kind} of what another program wrote")
            if kind == "store":
                for byte in range(size):
                    writers[cells + byte] = program
            left = left[~inside]
        if left.size:
            raise IndexError(f"out of bounds: {kind} of {left.size} lanes")

    def synchronise(self, program: int, address: int, semantics: Any, changes: bool) -> None:
        if not changes and (program, address) == self.asked:
            raise RuntimeError(f"deadlock: program {program} waits for one that has not run")
        self.asked = None if changes else (program, address)
        seen, released = self.seen.setdefault(program, set()), self.released.setdefault(address, set())
        if semantics in ACQUIRES:
            seen |= released
        if semantics in RELEASES:
            released |= seen | {program}


@contextmanager
def run_order(seed: int, leaders_last: bool = False) -> Iterator[None]:
    """Run the programs of each launch in an order drawn from `seed`, leaders first; or last, which shows who waits."""
    interpreter_builder.seed, interpreter_builder.leaders_last = seed, leaders_last
    try:
        yield
    finally:
        interpreter_builder.seed = None


class StrictBuilder(InterpreterBuilder):
    """Triton's operations, with those on memory, on bfloat16 and on e4m3 as the module says."""

    memory, order, seed, leaders = Memory(()), None, None, 0
    leaders_last = patched = False

    @property
    def program(self) -> int:
        (x, y, z), (width, height, _) = self.grid_idx, self.grid_dim
        return x + width * (y + height * z)

    def set_grid_idx(self, x, y, z):
        if self.seed is not None:
            if self.order is None:
                draw, all_of_them = random.Random(self.seed), range(self.grid_dim[0])
                parts = all_of_them[: self.leaders], all_of_them[self.leaders :]
                parts = parts[::-1] if self.leaders_last else parts
                self.order = [program for part in parts for program in draw.sample(part, len(part))]
            x = self.order[x]
        super().set_grid_idx(x, y, z)

    def create_masked_load(self, pointers, mask, *rest):
        self.memory.access(self.program, pointers, mask, "load")
        return super().create_masked_load(pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        self.memory.access(self.program, pointers, mask, "store")
        return super().create_masked_store(pointers, value, mask, *rest)

    def create_atomic_rmw(self, operation, pointer, value, mask, semantics, scope):
        self.memory.synchronise(self.program, int(pointer.data.item()), semantics, bool(value.data.any()))
        self.memory.access(self.program, pointer, mask, "atomic")
        return super().create_atomic_rmw(operation, pointer, value, mask, semantics, scope)

    def create_dot(self, a, b, d, precision, imprecise):
        return super().create_dot(_widen(a), _widen(b), d, precision, imprecise)

    def cast_impl(self, source, target):
        if target.scalar == source.dtype.scalar:
            return source
        if target.scalar in ROUND:
            return _rounded(source, target)
        return super().cast_impl(_widen(source), target)

    def create_fp_to_fp(self, source, target, mode):
        if target.scalar in ROUND:
            return _rounded(source, target)
        return super().create_fp_to_fp(_widen(source), target, mode)

    def binary_op(self, left, right, operation):
        if left.dtype.scalar in ROUND and operation in ARITHMETIC:
            raise NotImplementedError(f"{left.dtype.scalar} arithmetic: cast to float32 first")
        return super().binary_op(left, right, operation)


def install() -> None:
    """Make Triton's one builder of operations a `StrictBuilder`, and its launches known to it."""
    builder = interpreter_builder
    if isinstance(builder, StrictBuilder):
        return
    builder.__class__ = StrictBuilder
    start, patch, patch_tensor = GridExecutor._init_args_hst, interpreter._patch_lang, interpreter._patch_lang_tensor
    known_type = cache(interpreter._get_np_dtype)

    def checked_start(self, arguments, keywords):
        builder.memory, builder.order = Memory([*arguments, *keywords.values()]), None
        named = dict(zip(self.arg_names, arguments, strict=False)) | keywords
        builder.leaders = named.get("leaders", 0)
        return start(self, arguments, keywords)

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # numpy 2.4 wants .item()

    def patched_once(function):
        """Once for all that a launch calls; Triton does so again at each call, and never takes that back."""
        if builder.patched:
            return None
        scope = patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        scope.set_attr(builder, "patched", True)
        return scope

    def numpy_type(kind):
        """Triton makes its table anew for each question."""
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else known_type(element)

    GridExecutor._init_args_hst = checked_start
    interpreter._patch_lang, interpreter._patch_lang_tensor = patched_once, patched_tensor
    interpreter._get_np_dtype = numpy_type
    # whose findings nobody looks at, and which take a third of the time
    builder.options = replace(builder.options, sanitize_overflow=False)
    tl.constexpr.__rmod__ = lambda self, other: other % self.value  # which Triton 3.6 lacks, and a loop's count needs


def _rounded(source: TensorHandle, target: Any) -> TensorHandle:
    return TensorHandle(ROUND[target.scalar](_widen(source).data.astype(np.float32)), target.scalar)


def _widen(handle: TensorHandle) -> TensorHandle:
    """bfloat16 and e4m3 as float32; anything else as it is."""
    if handle.dtype.scalar == tl.float8e4nv:
        return TensorHandle(NUMBERS[handle.data], tl.float32)
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _numbers() -> np.ndarray:
    """The float32 number of each pattern of bits in e4m3: sign, 4 bits of exponent, 3 of fraction."""
    bits = np.arange(128)
    exponent, fraction = bits >> 3, bits & 7
    positive = np.where(exponent, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9)
    positive[127] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)


NUMBERS = _numbers()


def _round_e4m3(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest e4m3, ties to the even ones."""
    middles = (NUMBERS[:126] + NUMBERS[1:127]) / 2
    below, upto = (np.searchsorted(middles, np.abs(values), side) for side in ("left", "right"))
    nearest = np.where(below % 2 == 0, below, upto)
    return (np.where(np.isnan(values), 127, nearest) | np.signbit(values) << 7).astype(np.uint8)


ROUND = {tl.bfloat16: _round, tl.float8e4nv: _round_e4m3}
