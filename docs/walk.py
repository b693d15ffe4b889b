#!/usr/bin/env python
"""From a checkpoint to an answer in nine steps, each of which prints what it does. Read it beside its output.

python docs/walk.py
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from parallel_parnet import (  # noqa: E402
    Engine,
    Placement,
    fold,
    load_checkpoint,
)
from parallel_parnet.executors.schedule import fork_and_join  # noqa: E402
from parallel_parnet.preprocess import Preprocess, find_images  # noqa: E402

DEMO = ROOT / "launch" / "demo"

# 1. A checkpoint holds a network in training form: three streams of RepVGG-SSE blocks, each with three branches.
model = load_checkpoint(DEMO / "parnet_fashion.safetensors")
block = model.streams[0][0].block
print(f"1. training form: {sum(1 for _ in model.modules())} modules, streams of {model.config.blocks} blocks")

# 2. In a block, a 1x1 kernel is a 3x3 kernel with zeros around it, so the two convolutions add up to one. (Their batch
#    norms scale rows of the kernel and fold as well.)
x = torch.randn(1, 16, 8, 8)
three, one = block.rbr_dense.conv.weight, block.rbr_1x1.conv.weight
with torch.no_grad():
    apart = F.conv2d(x, three, padding=1) + F.conv2d(x, one)
    together = F.conv2d(x, three + F.pad(one, (1, 1, 1, 1)), padding=1)
print(f"2. two branches against one kernel: largest difference {(apart - together).abs().max():.0e}")

# 3. The network folds into a program: data, not modules. An operation's level is the length of the longest path from
#    the picture to it. A pass takes as many steps as there are levels, however many operations there are.
program = fold(model)
print(f"3. program: {len(program.operations)} operations on {program.depth} levels")
for level in range(1, program.depth + 1):
    print(f"   level {level:>2}: {', '.join(op.name for op in program.operations if op.level == level)}")

# 4. A placement says which lane runs what. A lane is a resource that runs operations one after another: a GPU, a CUDA
#    stream, a rank, or the CPU of one process. Here each stream gets its own lane; a feature that crosses lanes is a
#    transfer.
placement = Placement.by_streams(program, lanes=3)
for lane, runs in enumerate(placement.describe(program)):
    print(f"{'4.' if lane == 0 else '  '} lane {lane} runs {runs}")
for transfer in placement.transfers(program):
    print(f"   {transfer.feature} goes from lane {transfer.source} to lane {transfer.target}")

# 5. A segment is what a lane runs without waiting for another lane. Executors compile segments.
segments = placement.segments(program)
print(f"5. {len(segments)} segments, of {', '.join(str(len(s.operations)) for s in segments)} operations")

# 6. If lanes are queues of one device, events order them, so that each read follows its write.
steps = fork_and_join(segments, placement.coordinator)
print(f"6. as queues: {', '.join(f'{type(step).__name__.lower()} on {step.lane}' for step in steps[:6])}, ...")

# 7. Pictures are resized, cropped and normalised as in training.
preprocess = Preprocess.of(model.config)
paths = find_images([DEMO / "pictures"])
pictures = torch.stack([preprocess(path) for path in paths])
print(f"7. {len(paths)} pictures: {list(pictures.shape)}, mean {pictures.mean():.2f}")

# 8. The engine picks an executor and runs the program. Its answer equals the training form's up to rounding.
engine = Engine(program, device="cpu")
logits = engine(pictures)
with torch.no_grad():
    expected = model(pictures)
print(f"8. executor {engine.executor}: relative error {(logits - expected).norm() / expected.norm():.0e}")

# 9. The class is that of the largest logit.
for path, row in zip(paths, logits, strict=True):
    print(f"9. {path.name}: {model.config.labels[row.argmax()]}, {row.softmax(0).max():.0%}")
