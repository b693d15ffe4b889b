"""ncnn, of the libraries for CPUs the one that also uses Winograd's products, from the file of launch/export.py."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from parallel_parnet import ParNetError

from .peer_libraries import converted, need
from .subject import Contender, Runner, Subject

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
        command = [converter, "m.onnx", f"inputshape=[1,3,{subject.size},{subject.size}]", "fp16=0"]
        parameters, weights = converted(subject, command, folder, "m.ncnn.param", "m.ncnn.bin")
        net.load_param(str(parameters))
        net.load_model(str(weights))

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
