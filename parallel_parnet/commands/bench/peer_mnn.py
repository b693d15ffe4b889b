"""MNN, which also uses Winograd's products, from the file of launch/export.py."""

from __future__ import annotations

import sys
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from parallel_parnet import ParNetError

from .peer_libraries import converted, need
from .subject import Contender, Runner, Subject

# its command mnnconvert installs packages and reports to its maker; the function that it calls does neither
CONVERT = """from _tools import mnnconvert
mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", "m.onnx", "--MNNModel", "m.mnn", "--bizCode", "parnet"])
"""
MARGIN = 20.0  # its tiles of up to 8 x 8 were off by 5e-5 on ParNet-S and 9e-5 on XL; half precision is by 5e-4


def mnn_peer() -> Contender:
    return Contender("MNN, exported", False, _mnn, MARGIN)


def _mnn(subject: Subject) -> Runner:
    if subject.device.type != "cpu" or subject.dtype != torch.float32:
        raise ParNetError("raced on CPUs in fp32 alone")
    need("MNN", "MNN")
    from MNN import expr, nn

    settings = {"backend": "CPU", "precision": "high", "numThread": subject.threads}
    with TemporaryDirectory() as folder:
        (file,) = converted(subject, [sys.executable, "-c", CONVERT], folder, "m.mnn")
        runtime = nn.create_runtime_manager((settings,))
        names = {"runtime_manager": runtime, "shape_mutable": False}
        module = nn.load_module_from_file(str(file), ["input"], ["logits"], **names)
    place = expr.placeholder((subject.batch, 3, subject.size, subject.size), expr.NCHW, expr.float)

    def call(picture: Tensor, owner: object = runtime) -> Tensor:  # whose threads the module uses
        place.write(picture.numpy())
        return torch.from_numpy(module.forward(place).read())

    return Runner(call, f"{settings}, shape_mutable=False, from ONNX by its converter", "float32")
