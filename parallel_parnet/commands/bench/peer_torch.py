"""torch as its users run it: eager mode, torch.compile, and a CUDA graph of eager mode."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from parallel_parnet import ParNetError
from parallel_parnet.executors.backends import has_bf16
from parallel_parnet.executors.graph import capture
from parallel_parnet.program.contract import dtype_name

from .subject import Contender, Runner, Subject, on_device

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class InType(nn.Module):
    """A network in a type and memory format of its own, between fp32 pictures and fp32 logits."""

    def __init__(self, network: nn.Module, subject: Subject, layout: str) -> None:
        super().__init__()
        self.dtype, self.memory_format = subject.dtype, FORMATS[layout]
        network = deepcopy(network).to(subject.device, subject.dtype)
        self.network = network.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def forward(self, x_nchw: Tensor) -> Tensor:
        return self.network(x_nchw.to(self.dtype, memory_format=self.memory_format)).float()


def torch_peers() -> list[Contender]:
    """Eager mode and torch.compile on every device, CUDA graphs on GPUs."""
    return [
        Contender("eager", False, lambda s: _eager(s, s.network, "NCHW")),
        Contender("eager, channels_last", False, lambda s: _eager(s, s.network, "channels_last")),
        Contender("eager, fused", False, lambda s: _eager(s, s.fused, "channels_last")),
        Contender("CUDA graph of eager, fused", False, _graph),
        Contender("torch.compile", False, lambda s: _compiled(s, s.network)),
        Contender("torch.compile, fused", False, lambda s: _compiled(s, s.fused)),
    ]


def emulated(subject: Subject) -> bool:
    """Whether torch computes in a type that this CPU has no instructions for."""
    in_bf16 = subject.device.type == "cpu" and subject.dtype == torch.bfloat16
    return in_bf16 and not has_bf16()


def _runner(subject: Subject, call: Callable[[Tensor], Tensor], settings: str) -> Runner:
    arithmetic = dtype_name(subject.dtype) + (", emulated" if emulated(subject) else "")
    return Runner(torch.inference_mode()(call), settings, arithmetic, wait=on_device(subject))


def _eager(subject: Subject, network: nn.Module, layout: str) -> Runner:
    return _runner(
        subject, InType(network, subject, layout), f"inference_mode, {layout}, .to({dtype_name(subject.dtype)})"
    )


def _compiled(subject: Subject, network: nn.Module) -> Runner:
    if emulated(subject):
        raise ParNetError("would compile an emulation of bf16, which this CPU lacks: see eager mode")
    module = InType(network, subject, "channels_last")
    if subject.device.type == "cpu":
        compiled = torch.compile(module, fullgraph=True, dynamic=False)
        return packed(_runner(subject, compiled, "torch.compile(dynamic=False), freezing, channels_last"), subject)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, mode="max-autotune")
    return _runner(subject, compiled, "torch.compile(dynamic=False, mode='max-autotune'), channels_last")


def packed(runner: Runner, subject: Subject, **settings: bool) -> Runner:
    """A runner of torch.compile on a CPU, after a first run that compiled it with its weights packed as constants.

    Packing must be asked for while the network is traced too: torch.compile's `options` come too late for it.
    """
    with torch._inductor.config.patch(freezing=True, **settings):
        runner.call(subject.pictures(1)[0])
    return runner


def _graph(subject: Subject) -> Runner:
    if subject.device.type == "cpu":
        raise ParNetError("needs an NVIDIA GPU")
    module = InType(subject.fused, subject, "channels_last")
    (picture,) = subject.pictures(1)
    with torch.inference_mode():
        logits, replay = capture(lambda: module(picture), subject.device)

    def call(x_nchw: Tensor) -> Tensor:
        picture.copy_(x_nchw)
        replay()
        return logits

    return _runner(subject, call, "channels_last, cuDNN, captured once; picture copied in, logits not copied out")
