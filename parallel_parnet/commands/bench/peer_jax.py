"""ParNet in JAX, compiled by XLA: the fused network, NHWC, with weights taken from torch."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from parallel_parnet import ParNet, ParNetError

from ..common import words
from .fused import FusedBlock
from .peer_libraries import need
from .subject import Contender, Runner, Subject

Arrays = dict[str, Any]


def jax_peers() -> list[Contender]:
    """XLA on either kind of device."""
    return [Contender("JAX, fused", False, _jax)]


def _jax(subject: Subject) -> Runner:
    if not isinstance(subject.fused, ParNet):
        raise ParNetError(f"{subject.name} is no ParNet")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes most of the GPU's memory from others
    jax = need("jax", "jax")
    if subject.device.type == "cuda" and jax.default_backend() != "gpu":
        raise ParNetError("this jax sees no GPU: pip install 'jax[cuda13]'")
    dtype = words(subject.dtype)
    weights = {  # norms and biases stay in fp32, as torch computes them whatever the type
        name: jax.numpy.asarray(_shaped(tensor).numpy(), dtype if tensor.ndim == 4 else "float32")
        for name, tensor in subject.fused.state_dict().items()
    }
    device = jax.devices()[subject.device.index or 0]
    weights = jax.device_put(weights, device)
    network = Network(jax, subject.fused)
    compiled = jax.jit(lambda weights, x: network(weights, x.astype(dtype)))
    # full precision where fp32 is asked for, as for all others
    with jax.default_matmul_precision("highest" if subject.dtype == torch.float32 else "default"):
        compiled = compiled.lower(weights, jax.dlpack.from_dlpack(subject.pictures(1)[0])).compile()
    return Runner(
        lambda picture: compiled(weights, picture),
        "jax.jit, NHWC, XLA's defaults",
        dtype,
        take=jax.dlpack.from_dlpack,
        logits=torch.from_dlpack,
        wait=lambda answer: answer.block_until_ready(),
        events=False,
    )


def _shaped(tensor: Tensor) -> Tensor:
    """Kernels [O, I, H, W] as [H, W, I, O]; all else as it is."""
    return tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor


class Network:
    """The forward pass of a fused ParNet as a function of its weights, by torch's names. Features are NHWC."""

    def __init__(self, jax: Any, model: ParNet) -> None:
        self.jax, self.np, self.model = jax, jax.numpy, model
        self.names = {module: name for name, module in model.named_modules()}

    def __call__(self, w: Arrays, x_nchw: Any) -> Any:
        """Logits, fp32."""
        x, features = x_nchw.transpose(0, 2, 3, 1), []
        for init, stream in zip(self.model.inits, self.model.streams, strict=True):
            x = self.blocks(w, init, x)
            features.append(self.blocks(w, stream, x))
        if len(features) == 1:
            y = self.blocks(w, self.model.combine, features[0])
        else:
            y = self.blocks(w, self.model.downsamples_2[0], features[0])
            for feature, fusion in zip(features[1:-1], list(self.model.downsamples_2)[1:], strict=True):
                y = self.blocks(w, fusion, self.pair(w, fusion[0], feature, y))
            y = self.blocks(w, self.model.combine, self.pair(w, self.model.combine[0], features[-1], y))
        head = self.names[self.model.head["fc"]]
        return y.astype("float32").mean((1, 2)) @ w[f"{head}.weight"].T + w[f"{head}.bias"]

    def blocks(self, w: Arrays, part: nn.Module, x: Any) -> Any:
        """Every block within a part of the network, one after the other."""
        for module in part.modules():
            if isinstance(module, FusedBlock):
                x = self.block(w, module, x)
        return x

    def block(self, w: Arrays, block: FusedBlock, x: Any) -> Any:
        conv, gate, dtype = block.rbr_reparam, block.se.cvsig["conv"], x.dtype
        y = self.convolution(w, conv, x, conv.stride[0])
        if block.rbr_identity is not None:
            x = self.norm(w, block.rbr_identity, x)
        g = self.jax.nn.sigmoid(self.convolution(w, gate, x.mean((1, 2), keepdims=True)))
        y = y + x * g if block.rbr_identity is not None else y * (2 * g)
        y = getattr(self.jax.nn, self.model.config.activation)(y).astype(dtype)
        if conv.groups > 1:  # channel j of group g goes to place j * groups + g
            y = y.reshape(*y.shape[:3], conv.groups, -1).swapaxes(3, 4).reshape(y.shape)
        return y

    def convolution(self, w: Arrays, conv: nn.Conv2d, x: Any, stride: int = 1) -> Any:
        name, edge = self.names[conv], conv.kernel_size[0] // 2
        y = self.jax.lax.conv_general_dilated(
            x, w[f"{name}.weight"], (stride, stride), [(edge, edge)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=conv.groups,
            preferred_element_type=self.np.float32,  # or CPUs add up in bf16
        )  # fmt: skip
        return y if conv.bias is None else y + w[f"{name}.bias"]

    def norm(self, w: Arrays, norm: nn.BatchNorm2d, x: Any) -> Any:
        name = self.names[norm]
        scale = w[f"{name}.weight"] * self.jax.lax.rsqrt(w[f"{name}.running_var"] + norm.eps)
        return (x * scale + (w[f"{name}.bias"] - w[f"{name}.running_mean"] * scale)).astype(x.dtype)

    def pair(self, w: Arrays, pair: nn.Module, a: Any, b: Any) -> Any:
        """Batch norm on each, channels interleaved a0, b0, a1, b1, ..."""
        both = self.np.stack((self.norm(w, pair.b1, a), self.norm(w, pair.b2, b)), -1)
        return both.reshape(*a.shape[:3], -1)
