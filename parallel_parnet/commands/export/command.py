"""Write the folded network to a file that other libraries take, once it gave there what the engine gives here.

    python launch/export.py --model parnet_s --onnx parnet_s.onnx
    python launch/export.py --checkpoint FILE --onnx FILE.onnx --raw
    python launch/export.py --model parnet_s --outputs streams.1 streams.2 fused --onnx backbone.onnx
    python launch/export.py --pt2 parnet_fashion.pt2

ONNX: fp32, opset 17, standard operators; batch, height and width stay open. It is checked in ONNX Runtime and in
OpenVINO, as far as they are installed. A .pt2 file is torch.export's: torch.export.load(FILE).module() runs it.
Pictures that end as a single pixel fit into ONNX alone.

Exit status: 0; 2 for wrong input, a file that cannot be written, or answers that differ: then there is no file.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch

from parallel_parnet import ParNetError, Program, fold
from parallel_parnet.files import check_writable, write_atomically
from parallel_parnet.parity import LIMIT
from parallel_parnet.program.exported import least_side

from ..common import RANDOM, Parser, add_model_arguments, load_model
from ..ranks import Ranks
from .checks import BATCHES, Run, agree, onnx_readers, sizes, torch_reader


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write an ONNX model")
    parser.add_argument("--pt2", type=Path, metavar="FILE", help="write what torch.export.load reads")
    parser.add_argument("--raw", action="store_true", help="takes uint8 pictures, RGB, and normalises them itself")
    parser.add_argument(
        "--outputs", nargs="+", metavar="NAME", help="streams.0, ..., fused, logits (default: logits alone)"
    )
    args = parser.parse_args()
    if args.onnx is None and args.pt2 is None:
        raise ParNetError("nothing to write: give --onnx FILE, --pt2 FILE, or both")
    check_writable(args.onnx, args.pt2, reads=[args.checkpoint])
    return args


def put(path: Path, content: bytes, program: Program, raw: bool, readers: dict[str, Run], least: int = 1) -> None:
    """The file in its place, after the checks. least: the smallest side that it takes."""
    sides, (own, _) = sizes(program, least), sizes(program)
    errors = agree(program, sides, raw, readers)
    write_atomically(path, content)
    m, kind = program.size_multiple, "uint8, RGB" if raw else "float32, normalised"
    start = f" from {least}" if least > m else ""
    print(f"{path}: {len(content) / 1e6:.1f} MB; input {kind} [batch, 3, height, width], sides multiples of {m}{start}")
    if own < least:
        print(f"  note: a .pt2 file cannot hold the network for its own {own} pixels, which end as one; ONNX can")
    print(f"  outputs: {', '.join(program.answers)}")
    checked = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(
        f"  batches {', '.join(map(str, BATCHES))} of {' and '.join(map(str, sides))} pixels against the "
        f"engine, largest relative error: {checked} (limit {LIMIT[torch.float32]:.0e})"
    )


def main() -> int:
    args = parse_arguments()
    Ranks.from_environment().take_threads()
    model, weights = load_model(args)
    if weights == RANDOM:
        print("note: no checkpoint was given; the weights are random, so the answers mean nothing")
    program = fold(model, args.outputs)
    if args.onnx:
        content = program.to_onnx(args.raw).SerializeToString()
        put(args.onnx, content, program, args.raw, onnx_readers(content, list(program.answers)))
    if args.pt2:
        file = io.BytesIO()
        torch.export.save(program.to_exported_program(args.raw), file)
        put(args.pt2, file.getvalue(), program, args.raw, torch_reader(file.getvalue()), least_side(program))
    return 0
