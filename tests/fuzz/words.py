"""What people type as arguments of a command, and what launchers and shells set in its environment."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

NUMBERS = ("1", "2", "0", "-1", "1e3", "two", "", " 1", "٣", "²", "1" * 20, "9" * 5000, "nan", "inf", "-0.5", "1_0")
VALUES: dict[str, tuple[str, ...]] = {  # the first two are right, where there are so many
    "--image": ("pictures", "pictures/a.png", "text.png", "absent", "", ".", "\udcff.png", "[/b].png", "null",
                "n" * 300),
    "--checkpoint": ("tiny.safetensors", "tiny.pth.tar", "text.png", "absent", "n" * 300, "pictures", ""),
    "--labels": ("labels.txt", "text.png", "pictures", "absent"),
    "--model": ("parnet_fashion", "parnet_xxl", "", "\udcff"),
    "--json": ("out.json", "out.txt", "absent/out.json", "n" * 300, "pictures", "full", ""),
    "--jsonl": ("out.jsonl", "out.txt", "absent/out.jsonl", "pictures", "null", "labels.txt"),
    "--trace": ("out.json", "out.json.gz", "out.txt", "absent/out.json"),
    "--report": ("out.html", "out.deep.html", "pictures", "absent/out.html"),
    "--img-size": ("32", "64", *NUMBERS),
    "--device": ("cpu", "cpu:3", "cuda", "cuda:7", "meta", "toaster", "", "mps"),
    "--dtype": ("float32", "bf16", "fp16", "int8", "int4"),
    "--calibrate": ("pictures", "pictures/a.png", "text.png", "labels.txt", "absent.json", "absent", ""),
    "--executor": ("auto", "native", "eager", "reference", "triton", "cuda_graph", "cuda_streams", "tensorrt"),
    "--link": ("nvlink", "loopback", "5us,20GB/s", "5us", "0us,0GB/s", "-1us,nanGB/s", "1e999us,1GB/s", "text.png",
               "absent.json", "labels.txt:x", "pictures:y"),
    "--placement": ("streams", "auto", "best"),
    "--activation": ("silu", "relu", "selu"),
    "--transport": ("auto", "gloo", "shared", "nccl", "post"),
    **dict.fromkeys(("--iterations", "--warmup"), tuple(text for text in NUMBERS if text != "1" * 20)),
    **dict.fromkeys(("-b", "--threads", "--streams-per-gpu", "--num-classes", "--seed",
                     "--gpus", "--timeout", "--efficiency"), NUMBERS),
}  # fmt: skip
FLAGS = ("--ema", "--strict", "--verify", "--exactly", "--measure-links", "--help", "--nonsense", "-", "--", "\udcff")
OF = {
    "infer": ("--timeout", "1", "--checkpoint", "tiny.safetensors", "--image", "pictures"),
    "plan": ("--checkpoint", "tiny.safetensors", "--img-size", "32", "--gpus", "2"),
}
ONCE = ("--iterations", "1", "--warmup", "0")  # of infer, but with --jsonl, which refuses them
OPTIONS = {
    "infer": [*sorted(VALUES.keys() - {"--gpus", "--efficiency", "--model"}), "--ema", "--strict", "--verify"],
    "plan": ["--checkpoint", "--gpus", "--efficiency", "--img-size", "-b", "--link", "--dtype", "--json", "--exactly"],
}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "PARNET_ISA", "HOME", "TMPDIR",
             "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "GLOO_SOCKET_IFNAME", "LANG",
             "COLUMNS", "TERM", "NO_COLOR", "PYTHONUTF8")  # fmt: skip
SETTINGS = (*NUMBERS, "sse", "avx2", "avx3", "neon", "'", "false", "/proc", "~", "~x", "relative",
            "localhost", "x" * 5000, "\udcff", "C", "dumb", "true")  # fmt: skip


def arguments(rng: Random, options: Sequence[str] = (*VALUES, *FLAGS)) -> list[str]:
    words = []
    for option in rng.sample(options, rng.randrange(1, 4)):
        values = VALUES.get(option, ())
        words += [option, *([rng.choice(values[:2] if rng.random() < 0.6 else values)] if values else [])]
    return words


def variables(rng: Random) -> dict[str, str]:
    return {name: rng.choice(SETTINGS) for name in rng.sample(VARIABLES, rng.randrange(1, 4))}
