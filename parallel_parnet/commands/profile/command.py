"""Profile a run: with Nsight where it is installed, or from the traces that --trace writes.

    python launch/profile.py nsys --output DIR -- torchrun --nproc-per-node 3 launch/infer.py
    python launch/profile.py import DIR --trace merged.json.gz
    python launch/profile.py ncu --output DIR --kernel level -- python launch/infer.py --executor triton
    python launch/profile.py explain trace.json
    python launch/profile.py report trace.json --report page.html

nsys profiles every rank into a report of its own; import reads what `nsys export` makes of them. explain says where
the time of a request went, and what to fix first.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from parallel_parnet import ParNetError
from parallel_parnet.profiling import advice, nsight, report, trace_format

from ..common import Parser
from ..tracing import check_trace_arguments


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the launch command behind "--"."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = Parser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    nsys = actions.add_parser("nsys", help="profile a launch command with Nsight Systems")
    nsys.add_argument("--capture", choices=["nvtx", "cudaProfilerApi", "none"], default="nvtx", help="what is recorded")
    ncu = actions.add_parser("ncu", help="profile one kernel of a launch command with Nsight Compute")
    ncu.add_argument("--kernel", required=True, help="regular expression of the kernel's name")
    ncu.add_argument("--skip", type=int, default=0, help="launches of it to leave out first (default: %(default)s)")
    ncu.add_argument("--count", type=int, default=1, help="launches of it to profile (default: %(default)s)")
    ncu.add_argument(
        "--clock-control", choices=["base", "none"], default="base",
        help="none: leave the GPU's clocks as they are, as in a real run (default: %(default)s)",
    )  # fmt: skip
    for tool in (nsys, ncu):
        tool.add_argument("--output", type=Path, default=Path("profile"), help="folder (default: %(default)s)")
        tool.add_argument("--dry-run", action="store_true", help="print the command, and run nothing")
    exports = actions.add_parser("import", help="read what nsys recorded into a trace")
    exports.add_argument("folder", type=Path, help="the --output of nsys")
    exports.add_argument("--trace", type=Path, required=True, help="the trace to write, .json or .json.gz")
    explain = actions.add_parser("explain", help="say where the time went")
    draw = actions.add_parser("report", help="draw it as a page")
    for reading in (explain, draw):
        reading.add_argument("file", type=Path, help="what --trace wrote")
    draw.add_argument("--report", type=Path, required=True, help="the page to write, .html")
    parser.set_defaults(trace=None, report=None)
    args = parser.parse_args(words[:cut])
    if words[cut:] and args.action not in ("nsys", "ncu"):
        raise ParNetError(f"{args.action} starts nothing: leave out what is behind --")
    check_trace_arguments(args)
    return args, words[cut + 1 :]


def profile(args: argparse.Namespace, command: list[str]) -> int:
    """Run the launch command under nsys or ncu, or print how."""
    if args.action == "nsys":
        line = nsight.nsys_command(command, args.output, args.capture)
    else:
        line = nsight.ncu_command(
            command, args.output, args.kernel, args.skip, args.count, args.clock_control == "base"
        )
    if args.dry_run:
        print(shlex.join(line))
        return 0
    if shutil.which(args.action) is None:
        tool = {"nsys": "Nsight Systems", "ncu": "Nsight Compute"}[args.action]
        without = "or trace infer and bench without it, by --trace trace.json"
        raise ParNetError(f"{args.action} is not on the PATH: install {tool}, {without}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParNetError(f"--output {args.output}: no folder, and none can be made ({error.strerror})") from None
    return subprocess.run(line, check=False).returncode


def import_exports(args: argparse.Namespace) -> None:
    """Merge what Nsight Systems saw into the trace of the same run."""
    timeline = trace_format.read(args.folder / "trace.json.gz")
    for rank in range(timeline.known.lanes):
        recorded = args.folder / f"rank{rank}.nsys-rep"
        database = recorded.with_suffix(".sqlite")
        if not recorded.exists() or (database.exists() and database.stat().st_mtime >= recorded.stat().st_mtime):
            continue
        if shutil.which("nsys"):
            line = nsight.export_command(recorded)
            if status := subprocess.run(line, check=False, stdout=subprocess.DEVNULL).returncode:
                raise ParNetError(f"{recorded}: {shlex.join(line)} ended with exit status {status}")
    trace_format.write(nsight.merge(timeline, args.folder), args.trace)


def main() -> int:
    args, command = parse_arguments()
    if args.action in ("nsys", "ncu"):
        return profile(args, command)
    if args.action == "import":
        import_exports(args)
        return 0
    timeline = trace_format.read(args.file)
    if args.action == "explain":
        print(advice.explain(timeline))
    else:
        report.write(timeline, args.report)
    return 0
