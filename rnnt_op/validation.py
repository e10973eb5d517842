"""Argument checks: each error names the argument, what was expected and what came.

They look at dtypes, devices and shapes alone, so they hold while tracing; the ops repeat those of
tensors, for sizes that a tracer did not know. What has to be read is checked by ``batch``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from rnnt_op.activations import activation_named
from rnnt_op.arguments import LogitsArguments, NetworkArguments
from rnnt_op.topology import Topology

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
CHOICES = {
    "reduction": ("none", "sum", "mean"),
    "normalizer": ("softmax", "hat"),
}


def check_network(arguments: NetworkArguments) -> None:
    """Checks the tensors of a joint network without reading them."""
    encoder, predictor, weight = arguments.encoder, arguments.predictor, arguments.weight
    bias, ranges = arguments.bias, arguments.label_ranges
    given = {"encoder": encoder, "predictor": predictor, "weight": weight, "bias": bias}
    named = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in named.items():
        check_tensor(name, tensor, FLOAT_DTYPES)
    _check_dims("encoder", encoder, "(B, T, H)")
    _check_dims("predictor", predictor, "(B, U+1, H)")
    batch, frames, joint_dim = encoder.shape
    _check_batch("encoder", batch)
    _check_size("predictor", predictor, 0, batch, "the batch size of encoder")
    _check_size("predictor", predictor, 2, joint_dim, "the joint dimension of encoder")
    if weight is not None:
        _check_dims("weight", weight, "(V, H)")
        _check_size("weight", weight, 1, joint_dim, "the joint dimension of encoder")
    if bias is not None:
        if weight is None:
            raise ValueError("bias: expected None where weight is None, got a tensor")
        _check_dims("bias", bias, "(V,)")
        _check_size("bias", bias, 0, weight.shape[0], "the rows of weight")
    for name, tensor in named.items():
        _check_device(name, tensor, encoder.device, "encoder")
    states, device = predictor.shape[1], encoder.device
    _check_targets(arguments.targets, batch, states - 1, "predictor", device, "encoder")
    _check_lengths("encoder_lengths", arguments.encoder_lengths, batch, device)
    _check_lengths("target_lengths", arguments.target_lengths, batch, device)
    _check_label_ranges(ranges, batch, frames, "encoder", device)


def check_states(name: str, states: Tensor, joint_dim: int, dim: int | None) -> None:
    """Checks states that a module projects from ``dim``, or takes as they are (None). [..., dim]"""
    check_tensor(name, states, FLOAT_DTYPES)
    expected, what = (joint_dim, "joint_dim") if dim is None else (dim, f"{name}_dim")
    if states.dim() == 0 or _certainly(states.shape[-1] != expected):
        way_out = f"; give {name}_dim to have it projected" if dim is None else ""
        raise ValueError(
            f"{name}: expected size {expected} in the last dimension, {what}, got "
            f"{tuple(states.shape)}{way_out}"
        )


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    # DTensor costs half a second to import; whoever has one has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_tensor(name: str, tensor: object, dtypes: Sequence[torch.dtype]) -> None:
    """Checks that it is a tensor that the ops can read: local, dense, and of one of the dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if is_dtensor(tensor):
        raise TypeError(
            f"{name}: expected a whole local tensor, got a DTensor; only weight and bias may be "
            "sharded, by rows. If FSDP2 shards the output layer, let the module that owns it call "
            "the loss in its forward, as rnnt_op.JointRNNTLoss does, or name the method that reads "
            "the weight to torch.distributed.fsdp.register_fsdp_forward_method. Otherwise gather "
            "the tensor with .full_tensor(), or take this rank's part with .to_local()"
        )
    if tensor.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one; pad it with "
            "torch.nested.to_padded_tensor, since lengths say what is padding"
        )
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise TypeError(
            f"{name}: expected a dense tensor, got one of layout {layout}; convert it with "
            ".to_dense()"
        )
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {tensor.dtype}")


def check_logits(arguments: LogitsArguments) -> None:
    """Checks the tensors of given logits without reading them."""
    logits, ranges = arguments.logits, arguments.label_ranges
    check_tensor("logits", logits, FLOAT_DTYPES)
    _check_dims("logits", logits, "(B, T, U+1, V)" if ranges is None else "(B, T, R, V)")
    batch, device = logits.shape[0], logits.device
    _check_batch("logits", batch)
    labels = logits.shape[2] - 1 if ranges is None else None
    _check_targets(arguments.targets, batch, labels, "logits", device, "logits")
    _check_lengths("logit_lengths", arguments.logit_lengths, batch, device)
    _check_lengths("target_lengths", arguments.target_lengths, batch, device)
    _check_label_ranges(ranges, batch, logits.shape[1], "logits", device)


def check_same_dtype(**tensors: Tensor | None) -> None:
    """Checks that the tensors share the dtype of the first."""
    (first, reference), *others = [(n, t) for n, t in tensors.items() if t is not None]
    for name, tensor in others:
        if tensor.dtype != reference.dtype:
            raise TypeError(
                f"{name}: expected {reference.dtype}, the dtype of {first}, got {tensor.dtype}; "
                "cast it, or call under torch.autocast"
            )


def check_blank(blank: int, tokens: int) -> int:
    """Returns the blank index, counted from the end if negative."""
    if not -tokens <= blank < tokens:
        raise ValueError(
            f"blank: expected an index in [{-tokens}, {tokens}) for {tokens} tokens, got {blank}"
        )
    return blank + tokens if blank < 0 else blank


def check_topology(topology: Topology) -> None:
    if not isinstance(topology, Topology):
        raise TypeError(
            "topology: expected a rnnt_op.topologies.Topology, such as "
            f"rnnt_op.topologies.modified(), got {type(topology).__name__}"
        )


def check_columns(topology: Topology, blank: int, columns: int) -> int:
    """Checks that the logits' columns hold what a lattice needs.

    Args:
        columns: of the logits, the topology's extra ones included.

    Returns:
        The blank index, counted from the end if negative.
    """
    tokens = topology.tokens(columns)
    if tokens < 1:
        raise ValueError(
            f"topology: expected a token before its {topology.extra_columns} columns of durations, "
            f"got {columns} columns in all"
        )
    blank = check_blank(blank, tokens)
    further = [symbol.index for symbol in topology.symbols if symbol.source == "token"]
    if any(not -tokens <= index < tokens for index in further):
        raise ValueError(f"topology: expected its columns among {tokens} tokens, got {further}")
    if len({blank, *(index % tokens for index in further)}) <= len(further):
        raise ValueError(
            f"topology: expected columns that differ from each other and from blank ({blank}), "
            f"got {further}"
        )
    return blank


def check_options(**options: Any) -> None:
    """Checks options that stand for themselves, by their names; others pass."""
    for name, value in options.items():
        if name in CHOICES:
            check_choice(name, value, CHOICES[name])
        elif name == "activation":
            activation_named(value)
        elif name in ("fast_emit", "delay_penalty"):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
        elif name == "dropout":
            if not 0.0 <= value < 1.0:
                raise ValueError(f"dropout: expected a probability in [0, 1), got {value}")
        elif name == "clamp":
            if value != value:
                raise ValueError("clamp: expected a number, got nan; without clamping it is -1")
        elif name == "gradient_tolerance":
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(
                    f"gradient_tolerance: expected None or a share in [0, 1), got {value}"
                )
        elif name == "workspace_bytes" and value is not None and value <= 0:
            raise ValueError(f"workspace_bytes: expected None or a positive number, got {value}")


def check_without_weight(activation: str, dropout: float = 0, **_: Any) -> None:
    """Checks the options of a joint network without an output layer."""
    if activation != "identity":
        raise ValueError(
            "activation: expected 'identity' where weight is None and the logits are encoder + "
            f"predictor, got {activation!r}"
        )
    if dropout:
        raise ValueError(f"dropout: expected 0 where weight is None, got {dropout}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _certainly(condition: bool) -> bool:
    """The condition on sizes; false where a tracer cannot tell, since the op checks them again."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(condition)
    return condition


def _check_dims(name: str, tensor: Tensor, shape: str) -> None:
    if tensor.dim() != shape.count(",") + 1 - shape.count(",)"):
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def _check_batch(name: str, batch: int) -> None:
    if _certainly(batch == 0):
        raise ValueError(f"{name}: expected at least one sample, got an empty batch")


def _check_size(name: str, tensor: Tensor, dim: int, size: int, what: str) -> None:
    if _certainly(tensor.shape[dim] != size):
        raise ValueError(
            f"{name}: expected size {size} in dimension {dim}, {what}, got {tuple(tensor.shape)}"
        )


def _check_device(name: str, tensor: Tensor, device: torch.device, owner: str) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name}: expected device {device}, the device of {owner}, got {tensor.device}"
        )


def _check_targets(
    targets: Tensor,
    batch: int,
    labels: int | None,
    states_owner: str,
    device: torch.device,
    owner: str,
) -> None:
    check_tensor("targets", targets, INDEX_DTYPES)
    _check_dims("targets", targets, "(B, U)")
    _check_size("targets", targets, 0, batch, f"the batch size of {owner}")
    if labels is not None:
        _check_size("targets", targets, 1, labels, f"one less than the U+1 of {states_owner}")
    _check_device("targets", targets, device, owner)


def _check_lengths(name: str, lengths: Tensor, batch: int, device: torch.device) -> None:
    check_tensor(name, lengths, INDEX_DTYPES)
    _check_dims(name, lengths, "(B,)")
    _check_size(name, lengths, 0, batch, "the batch size")
    if lengths.device.type != "cpu":
        _check_device(name, lengths, device, "the inputs (or the CPU)")


def _check_label_ranges(
    label_ranges: Tensor | None, batch: int, frames: int, owner: str, device: torch.device
) -> None:
    if label_ranges is None:
        return
    check_tensor("label_ranges", label_ranges, INDEX_DTYPES)
    _check_dims("label_ranges", label_ranges, "(B, T, 2)")
    _check_size("label_ranges", label_ranges, 0, batch, "the batch size")
    _check_size("label_ranges", label_ranges, 1, frames, f"the frames of {owner}")
    _check_size("label_ranges", label_ranges, 2, 2, "first and end")
    if label_ranges.device.type != "cpu":
        _check_device("label_ranges", label_ranges, device, "the inputs (or the CPU)")
