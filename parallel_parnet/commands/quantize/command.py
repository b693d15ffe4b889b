"""Find the ranges by which a network computes in int8 or fp8, and say what each operation then costs in accuracy.

    python launch/quantize.py DIR --checkpoint FILE --out FILE.json
    python launch/quantize.py /usr/share/datasets/fashion-mnist --keep inits.0.1
    python launch/quantize.py /usr/share/datasets/fashion-mnist --dtype fp8

DIR holds pictures like those that the network will see: in any layout that training reads, or just pictures. At most
256 of them are taken for the ranges, and 128 others to say what int8 or fp8 costs: the relative error of the logits
against fp32, of the network as it is written and with one operation alone in it, the features that it reads included.
--out FILE.json is taken by infer and validate: --dtype int8 --calibrate FILE.json. It holds ranges, not weights, and
fits this network alone. fp8 has no such file: infer and validate find its ranges anew.

Exit status: 0; 2 for wrong input.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from parallel_parnet import ParNetError, Program, fold
from parallel_parnet.files import check_writable, write_json
from parallel_parnet.int8.calibration import Calibration
from parallel_parnet.int8.e4m3 import in_fp8, reach
from parallel_parnet.int8.errors import errors, errors_alone
from parallel_parnet.int8.kernels import in_int8, quantisable_operations
from parallel_parnet.int8.quantize import SEED, calibrate
from parallel_parnet.preprocess import Preprocess
from parallel_parnet.program.inputs import picture_side

from ..calibration import FP8, INT8, MOST, QUANTISED, open_pictures
from ..common import Parser, add_model_arguments, load_model, machine, pixels, plain_console
from ..common import table as make_table
from ..ranks import Ranks

COMPARED = 128  # pictures, by as many networks as there are operations


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("data", type=Path, metavar="DIR", help="pictures, in any of the layouts above")
    add_model_arguments(parser)
    parser.add_argument("--dtype", choices=list(QUANTISED), default=INT8, help="default: %(default)s")
    parser.add_argument("--img-size", type=pixels, help="pixels; default: the network's own")
    parser.add_argument(
        "--keep", action="append", default=[], metavar="NAME", help="operation that stays in fp32; may be repeated"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the calibration")
    parser.add_argument("--results-file", type=Path, metavar="FILE.json", help="write what each operation costs")
    args = parser.parse_args()
    if args.out and args.dtype == FP8:
        raise ParNetError("--out is for int8: give infer and validate --dtype fp8 --calibrate DIR")
    for path in filter(None, (args.out, args.results_file)):
        if path.suffix != ".json":
            raise ParNetError(f"{path}: give a name that ends in .json")
    check_writable(args.out, args.results_file, reads=[args.checkpoint])
    return args


def show(program: Program, alone: dict[str, float], all_error: float, keep: Sequence[str], dtype: str) -> None:
    """A row for each operation that can be quantised."""
    rows = make_table("operation", "stage", "shape", "error alone", title=f"Relative error of the logits in {dtype}")
    for op in (program.by_name[name] for name in alone):
        kept = " (kept in fp32)" if op.name in keep else ""
        rows.add_row(op.name + kept, op.label, f"{op.cin} to {op.cout}", f"{alone[op.name]:.2e}")
    rows.add_row("all but what is kept" if keep else "all of them", "", "", f"{all_error:.2e}")
    console = plain_console()
    console.soft_wrap = not console.is_terminal
    console.print(rows)


def main() -> int:
    args = parse_arguments()
    Ranks.from_environment().take_threads()
    model, weights = load_model(args)
    program = fold(model)
    preprocess = Preprocess.of(program.config, picture_side(program, args.img_size))
    pictures = open_pictures(args.data)
    quantisable_operations(program, args.keep)  # before anything is computed
    taken = pictures.spread(MOST)
    others = pictures.spread(COMPARED, frozenset(taken)) or taken
    batches = pictures.batches(taken, preprocess)
    if args.dtype == FP8:
        make = partial(in_fp8, program, reach(program, batches))
    else:
        ranges = calibrate(program, batches)
        make = partial(in_int8, program, ranges)
    alone = errors_alone(program, make, pictures.batches(others, preprocess))
    all_error = errors({"all": make(args.keep)}, program, pictures.batches(others, preprocess))["all"]
    same = "the same pictures" if others is taken else f"{len(others)} others"
    made = {
        "data": str(args.data), "pictures": len(taken), "of": pictures.count, "layout": pictures.name,
        "img_size": preprocess.size, "weights": weights, "seed": SEED, "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if args.out:
        Calibration.of(program, ranges, tuple(args.keep), made).save(args.out)
    if args.results_file:
        settings = {"program": program.digest, "dtype": args.dtype, "keep": args.keep, "errors_on": same, **made}
        settings["machine"] = machine(torch.device("cpu"))
        write_json(args.results_file, {"error": all_error, "alone": alone, "settings": settings})
    show(program, alone, all_error, args.keep, args.dtype)
    print(f"ranges from {len(taken)} pictures of {args.data} ({pictures.name}), errors on {same}; weights {weights}")
    if args.out:
        print(f"{args.out}: for --dtype int8 --calibrate {args.out}")
    return 0
