"""Triton segments under every placement: the bits of one lane, whatever queues, graphs or devices they run in."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cases import drawn
from parallel_parnet import Config, Engine, Placement, Program, create_model, fold
from parallel_parnet.commands.infer import command
from parallel_parnet.executors import local, making
from parallel_parnet.executors.graph import GraphExecutor
from parallel_parnet.executors.local import LocalExecutor
from parallel_parnet.executors.queues import Queues
from parallel_parnet.executors.triton_backend import TritonBackend, TritonSegment, whole
from parallel_parnet.kernels.gpu.arguments import Numbers
from parallel_parnet.kernels.gpu.launch import Launch
from parallel_parnet.program.pixels import fold_pixels

sys.path.append(str(Path(__file__).parents[3]))
from standins import RandomQueues, enqueue, graph

CPU = torch.device("cpu")
LIMITS = {torch.float32: 1e-5, torch.float16: 0.1, torch.bfloat16: 0.5}  # of four logits, which may nearly cancel out
THREE = Config((4, 8, 8, 8), blocks=(1, 1, 1), num_classes=4)  # streams; the smallest that have all there is
FOUR = Config((4, 4, 8, 8, 8), blocks=(1, 1, 1, 1), num_classes=4)


def small(config: Config, seed: int) -> Program:
    torch.manual_seed(seed)
    model = create_model(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = 1.0
    model.train()(torch.randn(4, 3, 64, 64))
    return fold(model.eval())


def anywhere(program: Program, lanes: int, seed: int) -> Placement:
    """Any operation on any lanes."""
    draw = random.Random(seed)
    where = {op.name: tuple(sorted(draw.sample(range(lanes), draw.randint(1, lanes)))) for op in program.operations}
    return Placement(lanes, where, draw.randrange(lanes))


def placed(
    program: Program, placement: Placement, dtype: torch.dtype, queues: Queues | None = None, raw: bool = False,
    devices: list[torch.device] | None = None,
) -> LocalExecutor:  # fmt: skip
    devices = devices or [CPU] * placement.lanes
    backend = TritonBackend(program, placement.segments(program), devices, dtype, raw)
    return LocalExecutor(placement, devices, backend, queues, peers=lambda writer, reader: True)


PLACEMENTS = [
    (THREE, 2, torch.float16, True), (THREE, 3, torch.float16, True), (FOUR, 4, torch.float16, True),
    pytest.param(THREE, 3, torch.float32, True, marks=pytest.mark.long), (THREE, 3, torch.bfloat16, False),
    (FOUR, 4, torch.float16, False),
]  # fmt: skip


@pytest.mark.parametrize(("config", "lanes", "dtype", "usual"), drawn(PLACEMENTS, 1 / 2))
def test_placements_change_no_bit(config, lanes, dtype, usual, seed):
    """Two batches and two sizes, in queues that run in any order that the events allow, over poisoned buffers."""
    program, m = small(config, seed), 64 if config is FOUR else 32
    by_streams = Placement.by_streams(program, lanes)
    placement = by_streams if usual else anywhere(program, lanes, seed)
    executor = placed(program, placement, dtype, RandomQueues(seed))
    alone = placed(program, Placement.single(program), dtype)
    reference = Engine(program, Placement.single(program), CPU, executor="reference")
    for shape in ((1, 3, m, m), (2, 3, m, 2 * m))[: 1 if config is FOUR else 2]:
        x = torch.randn(shape)
        expected = alone(x)
        assert torch.equal(executor(x), expected)
        limit = LIMITS[dtype]  # which a wrong feature exceeds; rounding is tested elsewhere
        assert ((expected - reference(x)).norm() / reference(x).norm()).item() < limit


def test_raw_pictures_in_a_graph(seed, monkeypatch):
    """The launches and copies that a capture recorded, of pictures that change, with a CUDA stream for each lane."""
    start = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self: enqueue(lambda: start(self)))
    program = small(THREE, seed)
    folded = fold_pixels(program, torch.float16)
    placement = Placement.by_streams(program, 3)
    lanes = placed(folded, placement, torch.float16, RandomQueues(seed), raw=True)
    executor = GraphExecutor("cuda_graph", lanes, graph)
    alone = placed(folded, Placement.single(program), torch.float16, raw=True)
    for _ in range(2):
        x = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
        assert torch.equal(executor(x), alone(x))
    assert executor.buffers(x.shape)[0].dtype == torch.uint8


def test_answers_that_are_features(seed, monkeypatch):
    """Of one lane and of three, and through a graph: the same bits, and the reference's up to rounding."""
    torch.manual_seed(seed)
    program = fold(create_model(THREE).eval(), outputs=("streams.0", "streams.2", "fused"))
    x = torch.randn(1, 3, 32, 64)
    expected = Engine(program, Placement.single(program), CPU, executor="reference")(x)
    alone = placed(program, Placement.single(program), torch.float32)(x)
    lanes = placed(program, Placement.by_streams(program, 3), torch.float32, RandomQueues(seed))
    at_once = lanes(x)
    start = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self: enqueue(lambda: start(self)))
    for answer in (alone, at_once, GraphExecutor("cuda_graph", lanes, graph)(x)):
        assert list(answer) == list(expected)
        for name, tensor in answer.items():
            assert tensor.shape == expected[name].shape and torch.equal(tensor, alone[name])
            assert ((tensor - expected[name]).norm() / expected[name].norm()).item() < 1e-5


def test_peers_are_written_to(seed):
    """A feature that another device alone reads is written there; what is copied is the picture alone."""
    program = small(THREE, seed)
    placement = Placement.by_streams(program, 3)
    between = []

    class Watched(RandomQueues):
        def between(self, source, target):
            between.append((source, target))
            return super().between(source, target)

    devices = [torch.device("cpu", lane) for lane in range(3)]  # whose tensors are all torch's "cpu"
    executor = placed(program, placement, torch.float16, Watched(seed), devices=devices)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(executor(x), placed(program, Placement.single(program), torch.float16)(x))
    assert sorted(between) == [(0, 1), (0, 2)]
    written = {name: device for (name, _), device in executor.homes.items()}
    assert written == {t.feature: devices[t.target] for t in placement.transfers(program) if t.feature != "input"}


def test_buffers_go_with_the_last_reference_to_them(seed):
    """A GPU's memory would be full of them before Python looks for cycles."""
    program = small(THREE, seed)
    placement = Placement.by_streams(program, 3)
    gc.collect()
    gc.disable()
    try:
        executor = placed(program, placement, torch.float16)
        graphs = GraphExecutor("cuda_graph", executor)
        graphs(torch.randn(1, 3, 32, 32))
        (captured,) = graphs._shapes._kept.values()
        made = captured.kept
        left = [
            weakref.ref(part) for part in (graphs, executor, executor.backend, made, *made.bindings._runners.values())
        ]
        del graphs, executor, captured, made
        assert len(left) > 6 and not any(part() for part in left)
    finally:
        gc.enable()


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_launches_get_the_right_tensors(lanes, seed):
    """Each operation of each launch, in every placement: its own weights, its inputs where their makers left them, its
    outputs where its readers look, and a grid that covers its tiles."""
    program = small(THREE, seed)
    placement = Placement.by_streams(program, lanes)
    executor = placed(program, placement, torch.float16)
    x = torch.randn(1, 3, 32, 32)
    executor(x)
    made = executor.kept(x.shape)
    runners: list[TritonSegment] = [made.bindings._runners[segment] for segment in executor.segments]
    cuts = whole(program, (1, 32, 32), torch.float16, CPU).cuts
    for i, (segment, runner) in enumerate(zip(executor.segments, runners, strict=True)):
        weights = {blocks.data_ptr(): key[0] for key, blocks in executor.backend._blocks.items()}
        outputs = {name: runner._features[name] for name in (*segment.reads, *segment.operations)}
        for message, (name, writer) in zip(
            runner.reads, zip(segment.reads, executor.sources[i], strict=True), strict=True
        ):
            maker = made.picture if writer < 0 else runners[writer]._features[name].message
            assert message.data_ptr() == maker.data_ptr(), "read where it was written"
        ops = [program.by_name[name] for name in segment.operations]
        levels = [f"level {level}" for level in sorted({op.level for op in ops if op.kind == "conv"})]
        assert [launch.name for launch in runner.launches if launch.name != "classifier"] == levels
        for launch in runner.launches[: len(levels)]:
            programs, units, leaders = 0, 0, launch.arguments[2]
            for operands, numbers in zip(*launch.arguments[:2], strict=True):
                name, given = weights[operands.weight.data_ptr()], Numbers(*(number.value for number in numbers))
                op = program.by_name[name]
                assert launch.name == f"level {op.level}"
                for tensor, source in zip((operands.a, operands.b), op.inputs, strict=False):
                    assert tensor.data_ptr() == outputs[source].y.data_ptr()
                assert operands.y.data_ptr() == outputs[name].y.data_ptr()
                assert operands.sums.data_ptr() == outputs[name].sums.data_ptr()
                assert (given.stride, given.groups, given.cout) == (op.stride, op.groups, op.cout)
                assert (given.first, given.lead) == (programs, units)
                programs += cuts[name].tile.programs(cuts[name].shape)
                units += cuts[name].tile.units(cuts[name].shape)
            assert launch.grid == (leaders + programs,) and 0 < leaders <= units
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for r in runners for t in r.outputs)
    assert all(end <= start for (_, end), (start, _) in pairwise(places)), "no two features share memory"


def test_the_command_with_queues_and_graphs(seed, monkeypatch, capsys):
    """`TRITON_INTERPRET=1 launch/infer.py --device cpu --executor cuda_streams`: the demo's pictures on three lanes."""
    captured = []

    class Captured(GraphExecutor):
        def __init__(self, name, source):
            captured.append(name)
            super().__init__(name, source, graph)

    monkeypatch.setattr(making, "GraphExecutor", Captured)
    monkeypatch.setattr(local, "Queues", lambda: RandomQueues(seed))
    monkeypatch.setattr(command, "stop_on_signals", lambda: None)
    arguments = ["--device", "cpu", "--executor", "cuda_streams", "--verify", "--iterations", "1", "--warmup", "0"]
    monkeypatch.setattr(sys, "argv", ["infer", *arguments])
    assert command.main() == 0
    told = capsys.readouterr().out
    assert "equal up to rounding" in told and "stem, stream 2" in told, told
    assert captured == ["cuda_streams"]
