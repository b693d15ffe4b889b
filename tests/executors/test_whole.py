"""What answers a picture like the last: it takes no other, and gives what the long way gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from parallel_parnet import Engine, ParNetError, fold
from parallel_parnet.executors.whole import Repeat
from small import OPTIONAL, SMALL, lively

pytestmark = pytest.mark.skipif("native" not in OPTIONAL, reason="no CPU kernels")

MODEL = lively(SMALL, 3)
PROGRAM = fold(MODEL)
SHAPE = 2, 3, 32, 64


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), words=None):  # type: ignore[no-untyped-def]
        return function(*arguments, **(words or {}))


class Overriding(TorchFunctionMode):
    pass


def repeating(dtype: torch.dtype = torch.float32) -> tuple[Engine, Repeat, Tensor]:
    """An engine that was called twice, what repeats it, and a picture such as it takes."""
    engine, x = Engine(PROGRAM, device="cpu", executor="native"), picture(dtype)
    engine(x)
    engine(x)
    assert engine._repeat is not None
    return engine, engine._repeat, x


def picture(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(0, 256, SHAPE, dtype=dtype) if dtype == torch.uint8 else torch.randn(SHAPE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_it_gives_what_the_long_way_gives(dtype: torch.dtype) -> None:
    """For pictures that lie in memory in any way, in inference mode too, and in memory of their own."""
    engine, repeat, x = repeating(dtype)
    y = picture(dtype)
    for z in (x, y.to(memory_format=torch.channels_last), y.flip(3).mT.contiguous().mT, y[:1].expand(SHAPE)):
        expected = engine._call(z, None)
        assert repeat.takes(z) and torch.equal(repeat(z), expected)
        with torch.inference_mode():
            assert repeat.takes(z)
            answer = engine(z)
        assert torch.equal(answer, expected) and not answer.is_inference()
        answer.fill_(float("nan"))
        assert torch.equal(engine(z), expected)


def test_another_type_in_between() -> None:
    """bf16 and fp32 share a plan, which remembers the type that it read last."""
    engine, repeat, x = repeating()
    expected = engine(x)
    engine.profile(picture(torch.bfloat16))
    assert torch.equal(repeat(x), expected)


OTHERS: dict[str, Callable[[Tensor], object]] = {
    "another number": lambda x: x[:1],
    "another size": lambda x: x.mT,
    "another type": lambda x: x.double(),
    "on no device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "blocked": lambda x: x.to_mkldnn(),
    "negated later": lambda x: torch._neg_view(x),
    "a parameter": torch.nn.Parameter,
    "no tensor": lambda x: x.numpy(),
}


@pytest.mark.parametrize("other", OTHERS)
def test_it_takes_no_other_picture(other: str) -> None:
    _, repeat, x = repeating()
    assert repeat.takes(x)
    assert not repeat.takes(OTHERS[other](x))  # type: ignore[arg-type]


def test_it_takes_no_picture_of_a_transform() -> None:
    engine, repeat, x = repeating()
    taken = []

    def see(z: Tensor) -> Tensor:
        taken.append((repeat.takes(z), repeat.takes(x)))
        return z

    torch.func.vmap(see)(x[None])
    assert taken == [(False, True)]
    with pytest.raises(ParNetError):
        torch.func.vmap(engine)(x[None])


@pytest.mark.parametrize("mode", [Watching, Overriding, lambda: torch.device("meta"), nullcontext])
def test_it_gives_way_to_modes(mode: Callable[[], AbstractContextManager]) -> None:
    _, repeat, x = repeating()
    with mode():
        takes = repeat.takes(x)
    assert takes == (mode is nullcontext)


def test_it_gives_way_to_recorders_and_compilers() -> None:
    engine, repeat, x = repeating()
    taken = []

    def see(z: Tensor) -> Tensor:
        taken.append(repeat.takes(z) or repeat.takes(x))
        return z + 1

    make_fx(see)(x)
    make_fx(see, pre_dispatch=True)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(see, x, check_trace=False)
    assert taken == [False, False, False]
    expected = engine(x) + 1
    torch._dynamo.reset()
    assert torch.equal(torch.compile(lambda z: engine(z) + 1, backend="eager")(x), expected)


def test_it_ends_with_its_kind_of_picture_and_its_executor() -> None:
    engine, _, x = repeating()
    engine(x[:1])
    assert engine._repeat is None
    engine = Engine(PROGRAM, device="cpu")
    engine(x)
    engine(x)
    assert engine._repeat is not None
    engine.warm_up(x)
    assert engine._repeat is None


@pytest.mark.parametrize(("dtype", "outputs"), [(torch.float16, None), (torch.float32, ("streams.1", "logits"))])
def test_what_takes_more_than_the_kernels_has_none(dtype: torch.dtype, outputs: tuple[str, ...] | None) -> None:
    """Pictures that numpy converts, and answers by name."""
    engine, x = Engine(fold(MODEL, outputs=outputs), device="cpu", executor="native"), picture(dtype)
    engine(x)
    engine(x)
    assert engine._repeat is None
