"""Whether a network is still made of what its class is made of: folded, or saved, an edited one would be another."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ParNetError

# what computes by these may take each other's places: whoever folds or saves batch norms and the classifier checks the
# rest of them
FREE: dict[type[nn.Module], tuple[object, ...]] = {
    _BatchNorm: (_BatchNorm.forward, nn.SyncBatchNorm.forward),
    nn.Linear: (nn.Linear.forward,),
}


def check_parts(edited: nn.Module, made: nn.Module) -> None:
    """Raise ParNetError for the first part that computes otherwise than the one of that name in `made`, a fresh module
    of the same configuration."""
    parts = dict(edited.named_modules(remove_duplicate=False))
    for name, own in made.named_modules():
        part = parts.get(name)
        if isinstance(own, tuple(FREE)) or name == "head.fc":
            fits = all(_forward(part) in known for kind, known in FREE.items() if isinstance(part, kind))
        else:
            fits = part is not None and _computes_alike(part, own)
        if not fits:
            given, due = ("missing" if module is None else _in_a_line(module) for module in (part, own))
            given += " of another forward or setting" if given == due or isinstance(own, tuple(FREE)) else ""
            of = name or "the network"
            raise ParNetError(f"{of} is {given}, where a ParNet has {due}: no other can be folded, or saved")


def _in_a_line(module: nn.Module) -> str:
    children = ", ".join(type(child).__name__ for child in module.children())
    return f"{type(module).__name__}({module.extra_repr() or children})"


def _forward(module: nn.Module) -> object:
    return getattr(module.forward, "__func__", None)


def _computes_alike(part: nn.Module, own: nn.Module) -> bool:
    if isinstance(own, nn.Dropout):  # nothing, in evaluation mode
        return isinstance(part, nn.Dropout | nn.Identity)
    in_order = not isinstance(own, nn.Sequential) or [*part._modules] == [*own._modules]
    if _forward(part) is not type(own).forward or not in_order or part.extra_repr() != own.extra_repr():
        return False
    # of which an average's text leaves one out
    return all(getattr(part, name) == getattr(own, name) for name in getattr(own, "__constants__", ()))
