"""Methods of a model that exists already, replaced."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def override_methods(module: nn.Module, overrides: type[nn.Module]) -> None:
    """Gives one object the methods of a class, in place, as a subclass would have them.

    Its class becomes one of the same name that inherits from ``overrides`` first, as FSDP2 does it:
    ``super()`` and ``isinstance`` work, methods keep their signatures, parameters, buffers and
    state dicts stay as they are, copies and pickles come back with the same methods. Once is
    enough: a second call changes nothing.

    Raises:
        ValueError: the object has one of the methods by itself, which would go before a class's.
    """
    kind = type(module)
    if issubclass(kind, overrides):
        return
    for name in vars(overrides):
        if name in vars(module) and hasattr(kind, name):
            raise ValueError(
                f"model: expected the {name} of {kind.__name__}, got one that was set on the "
                "object; fuse the loss before what sets it, such as accelerator.prepare()"
            )
    module.__class__ = _overridden(overrides, kind)


def class_before(module: nn.Module, overrides: type[nn.Module]) -> type:
    """The class that an object has, or had before it was given the methods of another."""
    classes = type(module).__mro__
    return classes[classes.index(overrides) + 1] if overrides in classes else classes[0]


def _subclass(overrides: Any, kind: Any) -> Any:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        if type(self) is not made:  # whoever made a class of this one knows the way back
            return kind.__reduce_ex__(self, protocol)
        return _bare, (overrides, kind), self.__getstate__()

    namespace: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__reduce_ex__": __reduce_ex__,
    }
    for name, method in vars(overrides).items():
        if inspect.isfunction(method) and hasattr(kind, name):
            namespace[name] = _with_signature_of(getattr(kind, name), method)
    made = type(kind.__name__, (overrides, kind), namespace)
    return made


# One class for one pair, so that an object and its copy are of the same class.
_overridden: Callable[[type, type], Any] = functools.cache(_subclass)


def _bare(overrides: type[nn.Module], kind: type[nn.Module]) -> Any:
    """An object without state, for pickle and copy to fill: a class made here has no name by which
    they would find it."""
    made = _overridden(overrides, kind)
    return made.__new__(made)


def _with_signature_of(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def method(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    return method
