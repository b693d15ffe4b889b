"""What the caller has set in torch, and a fork, change no answer; and the engine leaves both as they were."""

from __future__ import annotations

import ast
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Barrier, Event, Thread

import pytest
import torch

from conftest import ROOT
from forked import in_a_fork
from parallel_parnet import Config, Engine, ParNetError, fold
from parallel_parnet.executors.torch_backend import without_tf32
from parallel_parnet.network.checkpoint import with_arguments
from parallel_parnet.program.families import parallel_chains
from parallel_parnet.settings import Together, quiet
from small import OPTIONAL, SMALL, lively, relative

EXECUTORS = ["reference", "eager", *OPTIONAL]
MODEL = lively(SMALL, 2)
PROGRAM = fold(MODEL)
FACTORIES = {
    "arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros",
}  # fmt: skip
TYPED = FACTORIES - {"arange", "randint", "randperm"}  # which the caller's default type would change


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS: dict[str, Callable[[], AbstractContextManager]] = {
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),
    "default device": default_device,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_caller(setting: str, executor: str) -> None:
    """For an engine that is warm and meets a new shape, and for one made from the start; raw pictures as well."""
    pictures = [torch.randn(2, 3, 64, 64), torch.randn(1, 3, 32, 96), torch.randint(0, 256, (1, 3, 32, 32)).byte()]
    reference = Engine(PROGRAM, device="cpu", executor="reference")
    expected = [reference(x) for x in pictures]
    warm = Engine(PROGRAM, device="cpu", executor=executor)
    warm(pictures[0])
    with SETTINGS[setting]():
        program = fold(MODEL)
        fresh = Engine(program, device="cpu", executor=executor)
        got = [[engine(x) for x in pictures] for engine in (warm, fresh)]
        family = parallel_chains(4, 2, 4, 32)
        before = torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
        fresh.warm_up(pictures[0])
        assert before == (
            torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
        )  # fmt: skip
    assert program.digest == PROGRAM.digest and family.digest == parallel_chains(4, 2, 4, 32).digest
    for answers in [*got, [fresh(x) for x in pictures]]:
        assert all(relative(*pair) < 1e-5 for pair in zip(answers, expected, strict=True))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_answers_are_the_callers(executor: str) -> None:
    """They can be changed in place, and trained with, also where the caller was in inference mode."""
    engine, x = Engine(PROGRAM, device="cpu", executor=executor), torch.randn(1, 3, 32, 32, requires_grad=True)
    with torch.inference_mode():
        engine(x)
    logits = engine(x)
    logits -= logits.max()
    weight = torch.ones(10, requires_grad=True)
    (logits * weight).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, logits[0])


def test_whatever_allocates_says_type_and_device() -> None:
    """The default type is the process's: nothing else can keep it out of buffers whose addresses kernels are given. (A
    command has its process to itself.)"""
    wrong = []
    for folder in ("parallel_parnet", "kernels", "profiling"):
        for path in sorted(path for path in (ROOT / folder).rglob("*.py") if "commands" not in path.parts):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
                    said = {word.arg for word in node.keywords}
                    needed = {"device", "dtype"} if ast.unparse(node.func).split(".")[1] in TYPED else {"device"}
                    if needed - said and path.name != "settings.py":  # which asks what the default device is
                        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:60]}")
    assert not wrong, wrong


OF_THE_PROCESS: dict[str, tuple[AbstractContextManager, Callable[[], object]]] = {
    "convolutions": (without_tf32, lambda: torch.backends.cudnn.conv.fp32_precision),
    "products": (without_tf32, lambda: torch.backends.cuda.matmul.fp32_precision),
    "warnings": (quiet, lambda: [*warnings.filters]),
    "what a checkpoint may hold": (with_arguments, lambda: set(torch.serialization.get_safe_globals())),
}


@pytest.fixture
def tf32() -> Iterator[None]:
    """As a caller may have set it, whatever a command has set in this process before."""
    places = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "tf32"
    yield
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision


@pytest.mark.parametrize("setting", OF_THE_PROCESS)
def test_a_setting_of_the_process_stays_until_the_last_thread_leaves(setting: str, tf32: None) -> None:
    """The second thread comes in while the first is inside, and stays longer."""
    context, state = OF_THE_PROCESS[setting]
    barrier, seen, before = Barrier(2, timeout=20), [], state()

    def first() -> None:
        with context:
            seen.append(state())
            barrier.wait()
            barrier.wait()
        barrier.wait()

    def second() -> None:
        barrier.wait()
        with context:
            barrier.wait()
            barrier.wait()
            seen.append(state())

    threads = [Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] == seen[1] != before and state() == before


@pytest.mark.timeout(20)
def test_a_setting_is_changed_while_its_thread_changes_it() -> None:
    """As by a signal handler, at any moment of coming in or leaving."""
    inside: list[int] = []

    @contextmanager
    def nested() -> Iterator[None]:
        inside.append(len(inside))
        if len(inside) == 1:
            with change:
                assert inside == [0, 1]
        yield
        if len(inside) == 1:
            with change:
                assert inside == [0, 1]
        inside.pop()

    change = Together(nested)
    for _ in range(2):
        with change:
            assert inside == [0]
        assert not inside


def test_a_setting_can_be_changed_in_a_fork() -> None:
    """Though a thread of the parent was changing it, which the child has not."""
    began = Event()

    @Together
    @contextmanager
    def slow() -> Iterator[None]:
        began.set()
        time.sleep(1)
        yield

    def change() -> str:
        with slow:
            return "changed"

    thread = Thread(target=change)
    thread.start()
    began.wait()
    assert in_a_fork(change) == "changed"
    thread.join()


def test_a_fork_leaves_what_threads_had_changed() -> None:
    """Of those inside, a child has at most the one that forked."""
    changed, barrier = [False], Barrier(2, timeout=20)

    @Together
    @contextmanager
    def change() -> Iterator[None]:
        changed[0] = True
        yield
        changed[0] = False

    def inside() -> None:
        with change:
            barrier.wait()
            barrier.wait()

    def here_too() -> str:
        with change:
            return f"{changed[0]}"

    thread = Thread(target=inside)
    thread.start()
    barrier.wait()
    assert in_a_fork(lambda: f"{changed[0]}") == "False"
    with change:
        assert in_a_fork(lambda: f"{changed[0]}, then {here_too()}, {changed[0]}") == "True, then True, True"
    barrier.wait()
    thread.join()
    assert not changed[0]


@pytest.mark.parametrize("executor", ["auto", *EXECUTORS, pytest.param("inductor", marks=pytest.mark.long)])
def test_a_fork_works_or_says_so(executor: str) -> None:
    model = lively(Config((8, 16), blocks=(1,), num_classes=10), 2)  # of which Inductor compiles an operation a second
    program, x = fold(model), torch.randn(1, 3, 64, 64)
    engine = Engine(program, device="cpu", executor=executor)
    if executor == "auto":
        engine.warm_up(x)
    expected = engine(x)

    def of_the_parent() -> str:
        try:
            return str(engine(x))
        except ParNetError as error:
            return str(error)

    def of_the_child() -> str:
        try:
            made = Engine(fold(model), device="cpu", executor=executor)
            made.warm_up(x)
            return "equal" if relative(made(x), expected) < 1e-5 else "different"
        except ParNetError as error:
            return str(error)

    def with_more_threads() -> str:
        try:
            return str(Engine(program, device="cpu", executor=executor, threads=2)(x))
        except ParNetError as error:
            return str(error)

    assert "made before a fork" in in_a_fork(of_the_parent)
    needs_a_pool = executor in ("openvino", "inductor")
    assert ("do not survive a fork" if needs_a_pool else "equal") in in_a_fork(of_the_child)
    assert "2 compute threads in a forked process" in in_a_fork(with_more_threads) or needs_a_pool
    assert torch.equal(engine(x), expected), "the parent goes on"
