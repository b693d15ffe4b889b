"""Whether a network is still made of what its class is made of: folded, or saved, an edited one would be another."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ParNetError

# types that may be replaced here: whoever folds or saves batch norms and the classifier checks them in more detail
FREE = (_BatchNorm, nn.Linear)


def check_parts(edited: nn.Module, made: nn.Module) -> None:
    """Raise ParNetError for the first part that computes otherwise than the one of that name in `made`, a fresh module
    of the same configuration."""
    parts = dict(edited.named_modules(remove_duplicate=False))
    for name, own in made.named_modules():
        part = parts.get(name)
        if not (isinstance(own, FREE) or name == "head.fc") and (part is None or not _computes_alike(part, own)):
            given, due = ("missing" if module is None else _in_a_line(module) for module in (part, own))
            raise ParNetError(f"{name} is {given}, where a ParNet has {due}: no other can be folded, or saved")


def _in_a_line(module: nn.Module) -> str:
    children = ", ".join(type(child).__name__ for child in module.children())
    return f"{type(module).__name__}({module.extra_repr() or children})"


def _computes_alike(part: nn.Module, own: nn.Module) -> bool:
    if isinstance(own, nn.Dropout):  # nothing, in evaluation mode
        return isinstance(part, nn.Dropout | nn.Identity)
    same_forward = getattr(part.forward, "__func__", None) is type(own).forward
    in_order = not isinstance(own, nn.Sequential) or [*part._modules] == [*own._modules]
    return same_forward and in_order and part.extra_repr() == own.extra_repr()
