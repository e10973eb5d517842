"""Argument checks: each error names the argument, what was expected and what came.

``check_joint`` and ``check_logits`` look at dtypes, devices and shapes alone, so they hold while
tracing; the ops repeat them, for sizes that a tracer did not know. ``read_batch`` reads lengths,
labels and ranges, so it runs inside the ops, and brings what it needs of device-resident ones to
the host in one synchronisation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from rnnt_op.nodes import Batch
from rnnt_op.topology import Topology
from rnnt_op.torch_private import assert_on_device
from rnnt_op.transfer import to_device

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
ACTIVATIONS = ("tanh", "relu", "sigmoid", "identity")
REDUCTIONS = ("none", "sum", "mean")
NORMALIZERS = ("softmax", "hat")


def check_joint(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    encoder_lengths: Tensor,
    target_lengths: Tensor,
    label_ranges: Tensor | None,
) -> None:
    """Checks the tensors of the joint network without reading them."""
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
    _check_targets(targets, batch, predictor.shape[1] - 1, "predictor", encoder.device, "encoder")
    _check_lengths("encoder_lengths", encoder_lengths, batch, encoder.device)
    _check_lengths("target_lengths", target_lengths, batch, encoder.device)
    _check_label_ranges(label_ranges, batch, frames, "encoder", encoder.device)


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


def check_without_weight(activation: str, dropout: float) -> None:
    """Checks the options of a joint network without an output layer."""
    if activation != "identity":
        raise ValueError(
            "activation: expected 'identity' where weight is None and the logits are encoder + "
            f"predictor, got {activation!r}"
        )
    if dropout:
        raise ValueError(f"dropout: expected 0 where weight is None, got {dropout}")


def check_logits(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    label_ranges: Tensor | None,
) -> None:
    """Checks the tensors of ``rnnt_loss`` without reading them."""
    check_tensor("logits", logits, FLOAT_DTYPES)
    _check_dims("logits", logits, "(B, T, U+1, V)" if label_ranges is None else "(B, T, R, V)")
    batch = logits.shape[0]
    _check_batch("logits", batch)
    max_labels = logits.shape[2] - 1 if label_ranges is None else None
    _check_targets(targets, batch, max_labels, "logits", logits.device, "logits")
    _check_lengths("logit_lengths", logit_lengths, batch, logits.device)
    _check_lengths("target_lengths", target_lengths, batch, logits.device)
    _check_label_ranges(label_ranges, batch, logits.shape[1], "logits", logits.device)


def check_same_dtype(**tensors: Tensor | None) -> None:
    """Checks that the tensors share the dtype of the first."""
    (first, reference), *others = [(n, t) for n, t in tensors.items() if t is not None]
    for name, tensor in others:
        if tensor.dtype != reference.dtype:
            raise TypeError(
                f"{name}: expected {reference.dtype}, the dtype of {first}, got {tensor.dtype}; "
                "cast it, or call under torch.autocast"
            )


def check_blank(blank: int, vocab_size: int) -> int:
    """Returns the blank index, counted from the end if negative."""
    if not -vocab_size <= blank < vocab_size:
        raise ValueError(
            f"blank: expected an index in [{-vocab_size}, {vocab_size}) for {vocab_size} tokens, "
            f"got {blank}"
        )
    return blank + vocab_size if blank < 0 else blank


def check_lattice(
    blank: int,
    vocab_size: int,
    topology: Topology,
    normalizer: str,
    fast_emit: float,
    delay_penalty: float,
) -> int:
    """Checks what makes the lattice; returns the blank index, counted from the end if negative.

    Args:
        vocab_size: columns of the logits, the topology's extra ones included.
    """
    if not isinstance(topology, Topology):
        raise TypeError(
            "topology: expected a rnnt_op.topologies.Topology, such as "
            f"rnnt_op.topologies.modified(), got {type(topology).__name__}"
        )
    tokens = topology.tokens(vocab_size)
    if tokens < 1:
        raise ValueError(
            f"topology: expected a token before its {topology.extra_columns} columns of durations, "
            f"got {vocab_size} columns in all"
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
    check_choice("normalizer", normalizer, NORMALIZERS)
    check_not_negative("fast_emit", fast_emit)
    check_not_negative("delay_penalty", delay_penalty)
    return blank


def check_dropout(dropout: float) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def check_not_negative(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_clamp(clamp: float) -> None:
    if clamp != clamp:
        raise ValueError("clamp: expected a number, got nan; without clamping it is -1")


def check_gradient_tolerance(gradient_tolerance: float | None) -> None:
    if gradient_tolerance is not None and not 0.0 <= gradient_tolerance < 1.0:
        raise ValueError(
            f"gradient_tolerance: expected None or a share in [0, 1), got {gradient_tolerance}"
        )


def check_workspace_bytes(workspace_bytes: int | None) -> None:
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise ValueError(
            f"workspace_bytes: expected None or a positive number, got {workspace_bytes}"
        )


def read_batch(
    targets: Tensor,
    encoder_lengths: Tensor,
    target_lengths: Tensor,
    label_ranges: Tensor | None,
    *,
    max_frames: int,
    vocab_size: int,
    blanks: Sequence[int],
    max_states: int | None = None,
    lengths_name: str = "encoder_lengths",
) -> Batch:
    """Reads the lengths and checks them, and the labels and ranges that they leave valid.

    Lengths and ranges on a device come to the host together with the verdict on the labels, in one
    synchronisation. If only the labels live on a device, they are checked there by a device-side
    assertion.

    Args:
        targets, encoder_lengths, target_lengths, label_ranges: as in ``joint_rnnt_loss``.
        max_frames: T of the inputs.
        vocab_size: number of tokens.
        blanks: those that can be no labels.
        max_states: largest number of states that a range may hold.
        lengths_name: what the caller knows ``encoder_lengths`` by.
    """
    device = targets.device
    positions = torch.arange(targets.shape[1], device=device)
    valid = positions < to_device(target_lengths, device).unsqueeze(1)
    in_vocabulary = (targets >= 0) & (targets < vocab_size)
    for blank in blanks:
        in_vocabulary &= targets != blank
    are_good = (in_vocabulary | ~valid).all(1)

    given = (encoder_lengths, target_lengths, label_ranges)
    is_on_host = all(part is None or part.device.type == "cpu" for part in given)
    place = torch.device("cpu") if is_on_host else device
    lengths = [n.to(place, torch.int64) for n in (encoder_lengths, target_lengths)]
    columns = [*lengths]
    if label_ranges is not None:
        columns += _inspect_ranges(label_ranges.to(place, torch.int64), lengths, max_states)
        label_ranges = to_device(label_ranges, device)
    if place == device or device.type != "cuda":
        columns.append(are_good.long().to(place))
    else:
        assert_on_device(are_good.all(), "targets: a label is not a token or equals blank")
    frames, labels, *verdicts = torch.stack(columns).tolist()

    _check_range(lengths_name, frames, 1, max_frames, "frames")
    _check_range("target_lengths", labels, 0, targets.shape[1], "labels")
    restricted_nodes = None
    if label_ranges is not None:
        restricted_nodes, good_ranges, *verdicts = verdicts
        if not all(good_ranges):
            _raise_bad_range(label_ranges, frames, max_states)
    if verdicts and not all(verdicts[0]):
        _raise_bad_label(targets, labels, vocab_size, blanks)
    return Batch(targets, frames, labels, label_ranges, restricted_nodes)


def _inspect_ranges(
    label_ranges: Tensor, lengths: Sequence[Tensor], max_states: int | None
) -> tuple[Tensor, Tensor]:
    """How many nodes the ranges leave each sample, and whether they are ranges. [B], [B]"""
    frames, labels = lengths
    valid = torch.arange(label_ranges.shape[1], device=frames.device) < frames.unsqueeze(1)
    low, high = label_ranges.unbind(2)
    is_good = (low >= 0) & (low <= high)
    if max_states is not None:
        is_good &= high - low <= max_states
    nodes = torch.minimum(high, labels.unsqueeze(1) + 1).sub_(low).clamp_(min=0).mul_(valid).sum(1)
    return nodes, (is_good | ~valid).all(1).long()


def _raise_bad_range(label_ranges: Tensor, frames: Sequence[int], max_states: int | None) -> None:
    most = "" if max_states is None else f" at most {max_states} apart, the size of logits,"
    for b, (row, length) in enumerate(zip(label_ranges.tolist(), frames, strict=True)):
        for t, (low, high) in enumerate(row[:length]):
            if not 0 <= low <= high or (max_states is not None and high - low > max_states):
                raise ValueError(
                    f"label_ranges: expected 0 <= first <= end,{most} got ({low}, {high}) at "
                    f"sample {b}, frame {t}"
                )


def _check_range(name: str, lengths: list[int], low: int, high: int, unit: str) -> None:
    for b, length in enumerate(lengths):
        if not low <= length <= high:
            raise ValueError(f"{name}: expected {low} to {high} {unit}, got {length} at sample {b}")


def _raise_bad_label(
    targets: Tensor, labels: list[int], vocab_size: int, blanks: Sequence[int]
) -> None:
    for b, (row, length) in enumerate(zip(targets.tolist(), labels, strict=True)):
        for u, label in enumerate(row[:length]):
            if not 0 <= label < vocab_size:
                raise ValueError(
                    f"targets: expected labels in [0, {vocab_size}), got {label} at sample {b}, "
                    f"position {u}"
                )
            if label in blanks:
                equal = f"equals blank ({label})" if label == blanks[0] else "is a further blank"
                raise ValueError(f"targets: label {label} at sample {b}, position {u} {equal}")


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
