"""The engine: what it takes, what it refuses, and that answers stand on their own."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from parallel_parnet import VARIANTS, Engine, ParNetError, ParNetWarning, Placement, fold
from parallel_parnet.errors import warn
from parallel_parnet.executors import available
from parallel_parnet.executors.available import choose_executor, find_device, for_cpu
from parallel_parnet.executors.backends import missing
from parallel_parnet.executors.shapes import MAX_SHAPES, Shapes
from parallel_parnet.kernels.cpu import objects
from small import OPTIONAL, SMALL, lively, relative

MODEL = lively(SMALL, 2)
PROGRAM = fold(MODEL)
NESTED = torch.nested.nested_tensor([torch.zeros(3, 64, 64)])
NONE = "the CPU kernels were not compiled: with gcc 11 or later, install parallel_parnet again"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_against_its_training_form(name: str) -> None:
    model = lively(name, 0)
    x = torch.randn(6, 3, 64, 32)  # of one picture logits may cancel
    with torch.no_grad():
        expected = model(x)
    program = fold(model)
    for executor in ("eager", *OPTIONAL):
        assert relative(Engine(program, device="cpu", executor=executor)(x), expected) < 1e-5, executor
    if name in ("parnet_s", "parnet_fashion"):  # lively networks amplify rounding; golden ones are held to 1e-2
        x = torch.randn(6, 3, 64, 64)  # with AMX, torch 2.13 gets some convolutions to a single column wrong
        with torch.no_grad():
            expected = model(x)
        assert relative(Engine(program, device="cpu", executor="eager", dtype=torch.bfloat16)(x), expected) < 3e-2


@pytest.mark.parametrize("executor", ["eager", *OPTIONAL])
def test_an_engine_goes_with_the_last_reference_to_it(executor: str) -> None:
    """Its memory may be gigabytes, and Python looks for cycles when it has made many objects, not large ones."""
    gc.collect()
    gc.disable()
    try:
        engine = Engine(PROGRAM, device="cpu", executor=executor)
        engine(torch.randn(1, 3, 32, 32))
        (made,) = engine._executors.values()
        (shapes,) = (part for part in vars(made).values() if isinstance(part, Shapes))
        left = [weakref.ref(part) for part in (engine, made, shapes, *shapes._kept.values())]
        del engine, made, shapes
        assert len(left) == 4 and not any(part() for part in left)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, 64, 64), r"expected a tensor \[N, 3, H, W\]"),
        (torch.randn(1, 1, 64, 64), r"expected a tensor \[N, 3, H, W\]"),
        (torch.randn(0, 3, 64, 64), r"expected a tensor \[N, 3, H, W\]"),
        (torch.randn(1, 64, 64, 3), r"expected a tensor \[N, 3, H, W\]"),
        ("picture", "expected a tensor"),
        (NESTED, "a nested tensor: give pictures of one size at a time"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), "expected float32, bfloat16 or float16"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.float64), "expected float32, bfloat16 or float16"),
        (torch.randn(1, 3, 64, 65), "picture size 64 x 65: .* multiples of 32"),
        (torch.randn(1, 3, 0, 64), "multiples of 32"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.complex64).conj().imag, r"give its resolve_neg\(\)"),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit(x: object, message: str) -> None:
    with pytest.raises(ParNetError, match=message):
        Engine(PROGRAM, executor="eager", device="cpu")(x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "tensorrt"}, "choose one of auto"),
        ({"dtype": torch.float64}, r"choose torch\.float32"),
        ({"dtype": "float32"}, r"dtype 'float32': choose torch\.float32"),
        ({"transport": "carrier pigeon"}, "unknown transport 'carrier pigeon': choose one of auto"),
        ({"program": MODEL}, r"a program, and this is a ParNet: Engine\(fold\(model\)\)"),
        ({"placement": "auto"}, "placement 'auto': give a Placement, as Placement.by_streams makes one"),
        ({"placement": 3}, "placement 3: give a Placement"),
        ({"dtype": torch.float16, "device": "cpu"}, "float16 on the CPU"),
        ({"executor": "reference", "dtype": torch.bfloat16, "device": "cpu"}, "fp32 oracle"),
        *(
            ({"executor": name, "device": "cpu"}, f"{name} runs on NVIDIA GPUs: choose eager, or set TRITON_INTERPRET")
            for name in ("triton", "cuda_graph", "cuda_streams")
        ),
        ({"threads": 0, "device": "cpu"}, "0 threads: there must be at least 1"),
        ({"threads": 10**6, "device": "cpu"}, "at most 1024"),
        ({"threads": 1.5, "device": "cpu"}, r"1\.5 threads"),
        ({"device": "mps"}, "choose cpu or cuda"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ParNetError, match=message):
        Engine(**({"program": PROGRAM} | options))


@pytest.fixture
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Without optional packages and compiled kernels."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(objects, "HERE", tmp_path)
    caches = missing, warn, objects.in_use, objects.runnable, objects.load
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("_bare")
def test_what_cannot_be_had(tmp_path: Path) -> None:
    for executor, reason in (("openvino", "not installed here; pip install openvino"), ("native", NONE)):
        with pytest.raises(ParNetError, match=f"executor {executor}: {reason}.*, or choose eager"):
            Engine(PROGRAM, device="cpu", executor=executor)
    with pytest.warns(ParNetWarning, match=f"executor eager runs, since native cannot be had: {NONE}") as said:
        engine, *_ = (Engine(PROGRAM, device="cpu") for _ in range(2))
    assert len(said) == 1 and said[0].filename == __file__, "once, and at the line that made the engine"
    engine.save(tmp_path / "e.safetensors")
    warn.cache_clear()
    with pytest.warns(ParNetWarning, match="executor eager runs") as said_of_file:
        Engine.load(tmp_path / "e.safetensors", "cpu")
    assert said_of_file[0].filename == __file__, "the user's line also where the package calls itself"
    assert engine.notes == [str(said[0].message)]
    assert engine.executor == "eager" and engine.warm_up(torch.zeros(1, 3, 32, 32)) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
def test_no_gpu() -> None:
    with pytest.raises(ParNetError, match="no NVIDIA GPU"):
        Engine(PROGRAM, device="cuda")
    with pytest.raises(ParNetError, match="device cuda:0: torch sees no NVIDIA GPU"):
        Engine(PROGRAM, device=0)  # which is no device left open


@pytest.mark.parametrize("device", ["toaster", "meta", "mps", "cuda:99", 1.5])
def test_what_is_no_device(device: str, tmp_path: Path) -> None:
    Engine(PROGRAM, device="cpu").save(tmp_path / "e.safetensors")
    for make in (lambda: Engine(PROGRAM, device=device), lambda: Engine.load(tmp_path / "e.safetensors", device)):
        with pytest.raises(ParNetError, match=f"device {device}: "):
            make()


def test_what_gpus_run_and_which_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device(1) == find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ParNetError, match="device cuda:2: there are 2 GPUs here; count from 0"):
        find_device(2)
    gpu = torch.device("cuda", 1)
    for executor in ("native", "openvino"):
        with pytest.raises(ParNetError, match=f"executor {executor} runs on the CPU only: choose device cpu"):
            choose_executor(executor, gpu, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for executor in ("triton", "cuda_graph", "cuda_streams"):
        with pytest.raises(
            ParNetError, match=f"executor {executor} with TRITON_INTERPRET=1: unset it, or choose device"
        ):
            choose_executor(executor, gpu, torch.float32)


@pytest.mark.parametrize("others_have_it", [True, False])
def test_bf16_is_not_for_kernels_that_lack_it_where_others_have_it(
    others_have_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "lacking", lambda backend: None)
    monkeypatch.setattr(available, "arithmetic", lambda backend, dtype: torch.float32)
    monkeypatch.setattr(available, "has_bf16", lambda: others_have_it)
    assert for_cpu(torch.bfloat16) == (["openvino"] if others_have_it else ["native", "openvino"])
    assert for_cpu(torch.float32) == ["native", "openvino"]


@pytest.mark.skipif("openvino" not in OPTIONAL, reason="OpenVINO is not installed")
@pytest.mark.parametrize(("can", "runs_in"), [(["FP32", "BF16"], torch.bfloat16), (["FP32"], torch.float32)])
def test_what_openvino_makes_of_bf16(can: list[str], runs_in: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(get_property=lambda device, name: can)
    monkeypatch.setattr("parallel_parnet.executors.openvino_model.CORE", core)
    assert Engine(PROGRAM, device="cpu", dtype=torch.bfloat16, executor="openvino").arithmetic == runs_in


@pytest.mark.parametrize("executor", ["reference", "eager", "auto", *OPTIONAL])
def test_answers_do_not_alias(executor: str) -> None:
    engine = Engine(PROGRAM, device="cpu", executor=executor)
    x = torch.randn(1, 3, 64, 64)
    untouched = x.clone()
    first = engine(x)
    kept = first.clone()
    engine(torch.randn(1, 3, 64, 64))
    assert torch.equal(first, kept)
    assert torch.equal(x, untouched)
    assert first.dtype == torch.float32


@pytest.mark.parametrize("executor", ["eager", *OPTIONAL])
def test_sizes_and_batches_may_change(executor: str) -> None:
    engine = Engine(PROGRAM, device="cpu", executor=executor)
    reference = Engine(PROGRAM, device="cpu", executor="reference")
    shapes = [(n, h, w) for n in (1, 3) for h in (32, 64) for w in (32, 96, 128)]
    assert len(shapes) > MAX_SHAPES
    for n, h, w in shapes + shapes[:1]:
        x = torch.randn(n, 3, h, w)
        assert relative(engine(x), reference(x)) < 1e-5


def test_a_batch_is_its_pictures() -> None:
    engine = Engine(PROGRAM, device="cpu", executor="reference")
    x = torch.randn(5, 3, 64, 64)
    assert relative(engine(x), torch.cat([engine(picture[None]) for picture in x])) < 1e-5


def test_half_precision_input() -> None:
    engine = Engine(PROGRAM, device="cpu", executor="eager")
    x = torch.randn(1, 3, 64, 64).bfloat16()
    assert torch.equal(engine(x), engine(x.float()))


def test_profile_covers_every_operation() -> None:
    (lane,) = Engine(PROGRAM, device="cpu").profile(torch.randn(1, 3, 64, 64))
    assert [span.name for span in lane.spans] == [op.name for op in PROGRAM.operations]
    assert all(span.end >= span.start for span in lane.spans)
    assert all(later.start >= earlier.end for earlier, later in zip(lane.spans, lane.spans[1:], strict=False))


def test_calls_are_ordered_on_the_coordinators_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the caller's current one; and a call from another CUDA stream waits for the one before it."""
    placement = Placement(2, {op.name: (int(op.label != "stream 2"),) for op in PROGRAM.operations}, coordinator=1)
    engine, x, asked = Engine(PROGRAM, placement, "cpu", executor="eager"), torch.randn(1, 3, 32, 32), []
    engine(x)
    waits: list[tuple[str, str]] = []

    class Stream(str):
        def wait_stream(self, other: str) -> None:
            waits.append((self, other))

    callers = iter(map(Stream, ("first", "first", "second", "second", "first")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (asked.append(device), next(callers))[1])
    engine.device = torch.device("cuda")
    for _ in range(5):
        engine(x)
    assert asked == [torch.device("cuda", 1)] * 5
    assert waits == [("second", "first"), ("first", "second")]


def test_lanes_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One lane the caller's current one, as do CUDA streams of one GPU. All that have lanes are waited for."""
    first, second = gpus = [torch.device("cuda", i) for i in range(2)]
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    placement = Placement.by_streams(PROGRAM, 3)
    assert Engine(PROGRAM, None, "cuda", executor="eager").device == second
    streams = Engine(PROGRAM, placement, "cuda", executor="cuda_streams")
    assert {streams.lane_device(lane) for lane in range(3)} == {second}
    several = Engine(PROGRAM, placement, "cuda", executor="eager")
    assert [several.lane_device(lane) for lane in range(3)] == [first, second, first]
    several._synchronise()
    assert sorted(waited, key=str) == gpus


def test_what_the_other_ranks_end_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, or with the status of a refusal; after anything else they are not to be spoken to."""
    engine, statuses = Engine(PROGRAM, device="cpu", executor="eager"), []
    monkeypatch.setattr(engine, "close", lambda status=0: statuses.append(status))
    for error in (None, ParNetError("refused"), KeyError("a bug"), KeyboardInterrupt()):
        with suppress(ParNetError, KeyError, KeyboardInterrupt), engine:
            if error is not None:
                raise error
    assert statuses == [0, 2]


def test_copies_say_what_keeps_an_engine() -> None:
    engine = Engine(PROGRAM, device="cpu", executor="eager")
    for make in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ParNetError, match=r"keep it with Engine\.save and Engine\.load"):
            make(engine)
