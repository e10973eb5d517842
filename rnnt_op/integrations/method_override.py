"""Methods of a model that exists already, replaced."""

from __future__ import annotations

from torch import nn


def override_methods(module: nn.Module, overrides: type[nn.Module]) -> None:
    """Gives one object the methods of a class, in place, as a subclass would have them.

    Its class becomes one of the same name that inherits from ``overrides`` first, as FSDP2 does it:
    ``super()`` and ``isinstance`` work, parameters, buffers and state dicts stay as they are. Such
    an object has no importable class, so save its state dict rather than pickle it. Once is
    enough: a second call changes nothing.
    """
    kind = type(module)
    if not issubclass(kind, overrides):
        namespace = {"__module__": kind.__module__}
        module.__class__ = type(kind.__name__, (overrides, kind), namespace)
