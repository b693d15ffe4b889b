"""ncnn, of the libraries for CPUs the one that also uses Winograd's products, from the file of launch/export.py."""

from __future__ import annotations

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from parallel_parnet import ParNetError

from .peer_libraries import exported, need
from .subject import Contender, Runner, Subject

CONVERT_S = 120
HALVES = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic")  # which it takes wherever a CPU has them


def ncnn_peer() -> Contender:
    return Contender("ncnn, exported", False, _ncnn)


def _ncnn(subject: Subject) -> Runner:
    if subject.device.type != "cpu" or subject.dtype != torch.float32:
        raise ParNetError("fp32 on CPUs alone; its bf16 storage gave infinities")
    ncnn, converter = need("ncnn", "ncnn"), Path(need("pnnx", "pnnx").__file__ or "").with_name("pnnx")
    net = ncnn.Net()
    net.opt.num_threads = subject.threads
    for half in HALVES:
        setattr(net.opt, half, False)
    with TemporaryDirectory() as folder:
        Path(folder, "m.onnx").write_bytes(exported(subject))
        command = [converter, "m.onnx", f"inputshape=[1,3,{subject.size},{subject.size}]", "fp16=0"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=CONVERT_S, check=False)
        files = [Path(folder, f"m.ncnn.{kind}") for kind in ("param", "bin")]
        if done.returncode or not all(file.is_file() for file in files):
            raise ParNetError(f"pnnx made no network of it: exit status {done.returncode}")
        net.load_param(str(files[0]))
        net.load_model(str(files[1]))

    def one(picture: Any) -> Any:
        extractor = net.create_extractor()
        extractor.input("in0", picture)
        return extractor.extract("out0")[1]

    one_by_one = ", pictures of a batch one after another" if subject.batch > 1 else ""  # as it has no batches
    return Runner(
        lambda pictures: [one(picture) for picture in pictures],
        f"num_threads={subject.threads}, fp16 off, from ONNX by pnnx, fp16=0{one_by_one}",
        "float32",
        take=lambda batch: [ncnn.Mat(picture.numpy()).clone() for picture in batch],
        logits=lambda answers: torch.from_numpy(np.stack([np.array(answer) for answer in answers])),
    )
