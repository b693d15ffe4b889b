"""What cannot be right is refused in one line, before any work is done; names and limits of files: test_paths.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from parallel_parnet.commands import COMMANDS
from parallel_parnet.commands.calibration import OF_DEMO

PICTURES = "launch/demo/pictures"
ON_CPUS = [
    (("--model", "parnet_xxl"), "choose one of parnet_s"),
    (("--model", ""), "choose one of parnet_s"),
    (("--num-classes", "0"), "--num-classes 0: must be at least 1"),
    (("--num-classes", "-4"), "--num-classes -4: must be at least 1"),
    (("--checkpoint", "/dev/null"), "not a regular checkpoint file"),
    (("--checkpoint", "launch"), "a folder, not a checkpoint file"),
    (("--json", "-"), "standard output is no file here"),
    (("--jsonl", "-"), "standard output is no file"),
    (("--jsonl", "a.jsonl", "--json", "launch/../a.jsonl"), "named twice"),
    (("--link", "nvlink"), "add one, or leave --link out"),
    (("--checkpoint", "absent.pth.tar"), "no such checkpoint"),
    (("--checkpoint", "README.md"), "not a whole PyTorch checkpoint"),
    (("--image", "absent.png"), "no such file"),
    (("--image", "launch/demo/pictures", "absent.png", "--image", "README.md"), "absent.png: no such file"),
    (("--image", "README.md"), "not a picture"),
    (("--image", "tests"), "no pictures in this folder"),
    (("--image", "/dev/null"), "not a file"),
    (("--labels", "launch/demo/pictures/8-bag.png"), "save it as UTF-8"),
    (("--img-size", "50"), "multiples of 32"),
    (("--img-size", "0"), "give a positive number"),
    (("--img-size", "-32"), "give a positive number"),
    (("--dtype", "float16"), "choose float32 or bfloat16"),
    (("--executor", "tensorrt"), "invalid choice"),
    (("--nonsense",), "see --help"),
    (("-b", "1" * 20), "is beyond 2147483647"),
    (("--iterations", "0"), "at least 1"),
    (("--streams-per-gpu", "0"), "at least 1"),
    (("--streams-per-gpu", "1", "--strict"), "share 1 lane"),
    (("--placement", "auto", "--streams-per-gpu", "1"), "leave --streams-per-gpu and --strict out"),
    (("--placement", "auto", "--strict"), "leave --streams-per-gpu and --strict out"),
    (("--placement", "auto", "--link", "rumour"), "link 'rumour': choose one of"),
    (("--trace", "trace.json", "--link", "rumour"), "link 'rumour': choose one of"),
    (("--measure-links", "--verify", "--trace", "trace.json"), "leave --verify, --trace out"),
    (("--jsonl", "a.jsonl", "--verify"), "leave it out with --jsonl"),
    (("--jsonl", "a.jsonl", "--iterations", "7", "--warmup", "3"), "leave --iterations, --warmup out"),
    (("--measure-links", "--warmup", "0"), "leave --warmup out"),
    (("--executor", "cuda_streams"), "runs on NVIDIA GPUs: choose eager"),
    (("--model", "parnet_s", "--ema"), "--ema"),
    (("--labels", "README.md"), "give one name per line"),
    (("--device", "toaster"), "choose cpu or cuda"),
    (("--device", "cuda:99"), "device cuda:99: "),
    (("--dtype", "int8", "--model", "parnet_s"), "int8 needs ranges: give --calibrate FOLDER"),
    (("--dtype", "int8", "--executor", "openvino"), "openvino runs no program quantised to int8"),
    (("--dtype", "fp8", "--model", "parnet_s"), "fp8 needs ranges: give --calibrate FOLDER"),
    (("--dtype", "fp8", "--executor", "native"), "native runs no program quantised to float8_e4m3fn"),
    (("--dtype", "fp8", "--calibrate", str(OF_DEMO)), "int8.json: a file of ranges is for int8; give fp8"),
    (("--calibrate", PICTURES), "--calibrate is for int8 and fp8: add --dtype int8"),
]
OF_ITS_OWN = "leave --isolate out, and --batch-size, --img-size and --only"
REFUSED = [
    *((("infer", "--device", "cpu", *words), says) for words, says in ON_CPUS),
    (("quantize", PICTURES, "--dtype", "fp8", "--out", "a.json"), "--out is for int8: give infer"),
    (("quantize", PICTURES, "--keep", "stem"), "has this name; some are called inits.0.0, "),
    (("quantize", PICTURES, "--out", "a.txt"), "give a name that ends in .json"),
    (("bench", "--runs", "1"), "must be at least 2"),
    (("bench", "--budget", "0"), "must be positive"),
    (("bench", "--only", "nobody"), "choose one of"),
    (("bench", "--compare", "absent/a", "absent/b", "--out", "absent"), "no result of"),
    (("bench", "--poster", "--isolate"), OF_ITS_OWN),
    (("bench", "--poster", "--batch-size", "8"), OF_ITS_OWN),
    (("bench", "--poster", "--img-size", "64"), OF_ITS_OWN),
    (("bench", "--poster", "--only", "native"), OF_ITS_OWN),
    (("bench", "--speed", "high"), "see --help"),
    pytest.param(
        ("bench", "--device", "cuda"), "torch sees no NVIDIA GPU",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
    ),
    (("bench", "--dtype", "int8", "--poster"), "one network and one picture at a time"),
    (("bench", "--dtype", "int8", "--batch-size", "2"), "one network and one picture at a time"),
    (("throughput", "--budget", "0"), "must be positive"),
    (("throughput", "--batches", "4", "0"), "--batches: 0: must be at least 1"),
    (("throughput", "--out", "absent"), "no such folder"),
    (("versus", "--budget", "0"), "must be positive"),
    (("versus", "--figure", "a.jpg"), "ends in .svg or .png"),
    (("versus", "--page", "LICENSE"), "the page has neither"),
    (("versus", "--page", "docs/report.png"), "cannot be read"),
    (("latency-vs-depth", "--quick", "--out", "absent"), "no such folder"),
    (("latency-vs-depth", "--quick", "--only", "nothing"), "choose part of one of"),
    (("latency-vs-depth", "--quick", "--device", "toaster"), "choose cpu or cuda"),
    (("plan", "--gpus", "0"), "--gpus: 0: must be at least 1"),
    (("plan", "--link", "5us,-1GB/s"), "bandwidth -1e+09 bytes/s; it must be at least 1"),
    (("plan", "--link", "absent.json"), "no measured link"),
    (("plan", "--efficiency", "0.5", "--device", "measured"), "leave it out"),
    (("plan", "--dtype", "float32"), "give --dtype bfloat16"),
    (("plan", "--table", "--gpus", "2"), "give it alone"),
    (("plan", "--executor", "native"), "add --device measured"),
    (("plan", "--gpus", "1", "--figure", "plan.pdf"), "ends in .svg or .png"),
    (("plan-check", "--iterations", "0"), "must be at least 1"),
    (("plan-check", "--page", "docs/planner.md"), "give --json too"),
    (("plan-check", "--link", "infiniband"), "choose one of nvlink"),
    (("plan-check", "--page", "LICENSE", "--json", "a.json"), "the page has neither"),
    (("plan-check", "--models", "parnet_s", "parnet_z"), "parnet_z"),
    (("plan-check", "--device", "cpu", "--executor", "triton"), "runs on NVIDIA GPUs"),
    (("tune", "--minutes", "0"), "--minutes: 0: must be positive"),
    (("tune", "--batch-size", "0"), "--batch-size: 0: must be at least 1"),
    (("tune", "--model", "parnet_xxl", "--dry-run"), "unknown model 'parnet_xxl': choose one of parnet_s"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "says"), REFUSED, ids=lambda value: None if isinstance(value, str) else " ".join(value)
)
def test_what_is_refused(words: tuple[str, ...], says: str, here: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = here(*words)
    assert run.returncode == 2 and says in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert "Traceback" not in run.stderr and not run.stdout


@pytest.mark.parametrize("command", [name for name, command in COMMANDS.items() if not command.in_ranks])
def test_what_ranks_would_each_do_is_refused(command: str, here: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    run = here(command)
    assert run.returncode == 2 and not run.stdout
    assert run.stderr == f"error: {command} runs in one process: start it without torchrun's ranks\n"
