"""A file for other libraries gives there what the engine gives here, or is not written."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from parallel_parnet import Engine, ParNetError, Program
from parallel_parnet.parity import LIMIT, relative

BATCHES = (1, 2, 3)

Run = Callable[[Tensor], list[Tensor]]


def sizes(program: Program, least: int = 1) -> list[int]:
    """The network's own, where a file takes it, and the next that fits."""
    m = program.size_multiple
    side = -(-max(least, program.config.image_size) // m) * m
    return [side, side + m]


def pictures(sides: Sequence[int], raw: bool) -> Iterator[Tensor]:
    """Random, of every batch, and of every side as a height."""
    generator = torch.Generator("cpu").manual_seed(0)
    w = sides[0]
    for n, h in product(BATCHES, sides):
        if raw:
            yield torch.randint(0, 256, (n, 3, h, w), generator=generator, dtype=torch.uint8)
        else:
            yield torch.randn(n, 3, h, w, generator=generator)


def agree(program: Program, sides: Sequence[int], raw: bool, readers: Mapping[str, Run]) -> dict[str, float]:
    """The relative error of each reader's answers to all pictures together, of the worst of the outputs: that of one
    picture's would be large where its few logits lie near zero. ParNetError where one is off by more than rounding."""
    engine = Engine(program, device="cpu", executor="reference")
    expected: list[list[Tensor]] = []
    got: dict[str, list[list[Tensor]]] = {name: [] for name in readers}
    for x in pictures(sides, raw):
        answer = engine(x)
        expected.append([answer] if isinstance(answer, Tensor) else list(answer.values()))
        for name, run in readers.items():
            try:
                got[name].append([a.reshape(b.shape) for a, b in zip(run(x), expected[-1], strict=True)])
            except Exception as error:  # whatever libraries raise
                said = (str(error) or type(error).__name__).splitlines()[0]
                raise ParNetError(f"{name} cannot run it ({said}): nothing written") from None
    worst = {name: max(map(relative, _pooled(answers), _pooled(expected))) for name, answers in got.items()}
    for name, error in worst.items():
        if error > LIMIT[torch.float32]:
            raise ParNetError(f"{name} is off by {error:.1e}, over {LIMIT[torch.float32]:.0e}: nothing written")
    return worst


def _pooled(answers: list[list[Tensor]]) -> list[Tensor]:
    """Each output's values, of all pictures one after the other."""
    return [torch.cat([values.flatten() for values in output]) for output in zip(*answers, strict=True)]


def onnx_readers(model: bytes, names: list[str]) -> dict[str, Run]:
    """What is installed here of ONNX Runtime and OpenVINO, with the model. ParNetError where neither is."""
    makers = {"ONNX Runtime": ("onnxruntime", _onnxruntime), "OpenVINO": ("openvino", _openvino)}
    found = {name: make for name, (package, make) in makers.items() if importlib.util.find_spec(package)}
    if not found:
        raise ParNetError("nothing here can check an ONNX file: pip install 'parallel_parnet[export]'")
    return {name: make(model, names) for name, make in found.items()}


def torch_reader(file: bytes) -> dict[str, Run]:
    """torch, with the file."""
    module = torch.export.load(io.BytesIO(file)).module()

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            answer = module(x)
        return [answer] if isinstance(answer, Tensor) else list(answer)

    return {"torch": run}


def _onnxruntime(model: bytes, names: list[str]) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(answer) for answer in session.run(names, {"input": x.numpy()})]


def _openvino(model: bytes, names: list[str]) -> Run:
    from parallel_parnet.executors.openvino_model import CORE

    compiled = CORE.compile_model(CORE.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(x: Tensor) -> list[Tensor]:
        answers = compiled([x.numpy()])
        return [torch.tensor(answers[name]) for name in names]

    return run
