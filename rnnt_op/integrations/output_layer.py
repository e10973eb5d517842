"""What a layer computes that is read and not called.

A loss without logits computes what a model's joint network and output layer compute, from their
parameters. Whatever else these do when they are called would be lost in silence: hooks, a forward
of one's own, adapters. So every forward asks here, and what is not known is refused. Calling
nothing, it knows classes by name and imports no package.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from rnnt_op.torch_private import call_hooks, is_fake, weight_hooks
from rnnt_op.validation import is_dtensor

__all__ = ["check_known", "owner", "qualified_name", "weight_and_bias"]

WeightAndBias = tuple[Tensor, Tensor | None]

_LOGITS = "or leave the model as it is, or give its logits to rnnt_op.rnnt_loss"


def qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def owner(kind: type, method: str) -> str:
    """Qualified name of the class that a class has a method from; without it, of the class."""
    return qualified_name(next((base for base in kind.__mro__ if method in vars(base)), kind))


def check_known(module: Any, name: str, kinds: Collection[str]) -> str:
    """Checks that a call of the module would run its class's forward and nothing else.

    Args:
        name: what errors call the module.
        kinds: qualified names of the classes that are known; subclasses are not.

    Returns:
        That of the module's class, before parametrizations.

    Raises:
        ValueError: the class is none of these, or the module has hooks, or a forward of its own.
    """
    is_module = isinstance(module, nn.Module)
    kind = qualified_name(type_before_parametrizations(module) if is_module else type(module))
    if not is_module or kind not in kinds:
        raise ValueError(
            f"{name}: expected {' or '.join(sorted(kinds))}, got {kind}, which is not called here, "
            f"so that what it does besides would be lost; put one of these in its place, {_LOGITS}"
        )
    if "forward" in vars(module):
        raise ValueError(
            f"{name}: expected the forward of {kind}, got one that was set on the object and would "
            f"not be called here; delete {name}.forward, {_LOGITS}"
        )
    if weight_hooks(module):
        raise ValueError(
            f"{name}: expected no hook, got {_hook_names(weight_hooks(module))}, which makes the "
            "weight before a forward that is not called here; take weight_norm and spectral_norm "
            "from torch.nn.utils.parametrizations, end pruning with torch.nn.utils.prune.remove, "
            f"{_LOGITS}"
        )
    if call_hooks(module):
        raise ValueError(
            f"{name}: expected no hook, got {_hook_names(call_hooks(module))}, which would not be "
            f"called here; call remove() of what registered it returned, {_LOGITS}"
        )
    return kind


def weight_and_bias(layer: Any, name: str) -> WeightAndBias:
    """Weight and bias of the affine map that a layer computes, with gradients to what they are of.

    Known are ``torch.nn.Linear``, parametrized or not, SpeechBrain's ``Linear``, and peft's LoRA
    and ``modules_to_save`` on one of these, in the state that they are in.

    Args:
        layer: the layer.
        name: what errors call it.

    Returns:
        Weight, [V, H], in the dtype of the layer's own, and bias, [V], if there is one.

    Raises:
        ValueError: it is another layer, or computes more than this, as :func:`check_known` and the
            readers of this module word it.
    """
    return _READERS[check_known(layer, name, _READERS)](layer, name)


def _linear(layer: Any, name: str) -> WeightAndBias:
    weight, bias = layer.weight, layer.bias  # read once: spectral_norm's changes with every reading
    for tensor in (weight, bias):
        is_plain = type(tensor) in (Tensor, nn.Parameter, type(None))
        if not (is_plain or is_dtensor(tensor) or is_fake(tensor)):
            raise ValueError(
                f"{name}: expected a weight and a bias that are plain tensors, got "
                f"{type(tensor).__name__}; train the output layer unquantised, {_LOGITS}"
            )
    return weight, bias


def _speechbrain_linear(layer: Any, name: str) -> WeightAndBias:
    if layer.max_norm is not None:
        raise ValueError(
            f"{name}: expected no max_norm, got {layer.max_norm}; forward, which rescales the "
            f"weight by it, is not called here; build the layer without it, {_LOGITS}"
        )
    if layer.combine_dims:
        raise ValueError(
            f"{name}: expected combine_dims=False, got True, which joins two dimensions of the "
            f"joint network's output; build the layer without it, {_LOGITS}"
        )
    return weight_and_bias(layer.w, f"{name}.w")


def _modules_to_save(wrapper: Any, name: str) -> WeightAndBias:
    active, copies = _names(wrapper.active_adapter), wrapper.modules_to_save
    if wrapper.disable_adapters or not active or any(one not in copies for one in active):
        return weight_and_bias(wrapper.original_module, f"{name}.original_module")
    return weight_and_bias(copies[active[0]], f"{name}.modules_to_save[{active[0]!r}]")


def _lora(layer: Any, name: str) -> WeightAndBias:
    """The layer's weight + Σ scaling · B · A over active adapters, rounded to the layer's dtype."""
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its forward does
    base, base_bias = weight_and_bias(layer.base_layer, f"{name}.base_layer")
    weight, bias = base, base_bias
    if layer.disable_adapters or layer.merged:
        return weight, bias
    for adapter in _names(layer.active_adapter):
        if adapter not in layer.lora_A:
            continue
        _check_adapter(layer, name, adapter)
        a, b = (
            weight_and_bias(getattr(layer, part)[adapter], f"{name}.{part}[{adapter!r}]")
            for part in ("lora_A", "lora_B")
        )
        with torch.autocast(base.device.type, enabled=False):  # it would round the product
            weight = weight + layer.scaling[adapter] * (b[0] @ a[0])
        if b[1] is not None:
            added = layer.scaling[adapter] * b[1]
            bias = added if bias is None else bias + added
    return weight.to(base.dtype), None if bias is None else bias.to(base.dtype)


def _check_adapter(layer: Any, name: str, adapter: str) -> None:
    variant = getattr(layer, "lora_variant", {}).get(adapter)  # none before peft 0.16
    if variant is not None or layer.use_dora.get(adapter):
        found = "DoRA" if variant is None else type(variant).__name__
        raise ValueError(
            f"{name}: expected LoRA, got adapter {adapter!r} with {found}; leave the output layer "
            f"out of target_modules, or have plain LoRA there, {_LOGITS}"
        )
    part = f"{name}.lora_dropout[{adapter!r}]"
    dropout = layer.lora_dropout[adapter]
    kind = check_known(dropout, part, ("torch.nn.modules.linear.Identity", _DROPOUT))
    if kind == _DROPOUT and dropout.training and dropout.p > 0:
        raise ValueError(
            f"{part}: expected none while training, got {dropout.p}, which would drop what LoRA "
            "alone reads; set lora_dropout=0, or rank_pattern and target_modules such that another "
            f"adapter without dropout is on the output layer, {_LOGITS}"
        )


def _names(active: str | list[str]) -> list[str]:
    return [active] if isinstance(active, str) else active


def _hook_names(hooks: Collection[Callable[..., Any]]) -> str:
    return ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in hooks)


_DROPOUT = "torch.nn.modules.dropout.Dropout"

_READERS: dict[str, Callable[[Any, str], WeightAndBias]] = {
    "torch.nn.modules.linear.Linear": _linear,
    "speechbrain.nnet.linear.Linear": _speechbrain_linear,
    "peft.tuners.lora.layer.Linear": _lora,
    "peft.utils.other.ModulesToSaveWrapper": _modules_to_save,
}
