"""Argument checks: each error names the argument, what was expected and what came.

``check_joint`` and ``check_logits`` look at dtypes, devices and shapes alone, so they hold while
tracing. ``check_values`` reads lengths and labels, so it runs inside the ops, and brings
device-resident lengths to the host in one synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rnnt_op.topology import Topology
from rnnt_op.transfer import to_device

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
ACTIVATIONS = ("tanh", "relu", "sigmoid", "identity")
REDUCTIONS = ("none", "sum", "mean")
NORMALIZERS = ("softmax", "hat")


def check_joint(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    encoder_lengths: Tensor,
    target_lengths: Tensor,
) -> None:
    """Checks the tensors of the joint losses without reading them."""
    named = {"encoder": encoder, "predictor": predictor, "weight": weight}
    if bias is not None:
        named["bias"] = bias
    for name, tensor in named.items():
        _check_tensor(name, tensor, FLOAT_DTYPES)
    _check_dims("encoder", encoder, "(B, T, H)")
    _check_dims("predictor", predictor, "(B, U+1, H)")
    _check_dims("weight", weight, "(V, H)")
    batch, _, joint_dim = encoder.shape
    _check_batch("encoder", batch)
    _check_size("predictor", predictor, 0, batch, "the batch size of encoder")
    _check_size("predictor", predictor, 2, joint_dim, "the joint dimension of encoder")
    _check_size("weight", weight, 1, joint_dim, "the joint dimension of encoder")
    if bias is not None:
        _check_dims("bias", bias, "(V,)")
        _check_size("bias", bias, 0, weight.shape[0], "the rows of weight")
    for name, tensor in named.items():
        _check_device(name, tensor, encoder.device, "encoder")
    _check_targets(targets, batch, predictor.shape[1] - 1, "predictor", encoder.device, "encoder")
    _check_lengths("encoder_lengths", encoder_lengths, batch, encoder.device)
    _check_lengths("target_lengths", target_lengths, batch, encoder.device)


def check_logits(
    logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor
) -> None:
    """Checks the tensors of ``rnnt_loss`` without reading them."""
    _check_tensor("logits", logits, FLOAT_DTYPES)
    _check_dims("logits", logits, "(B, T, U+1, V)")
    batch = logits.shape[0]
    _check_batch("logits", batch)
    _check_targets(targets, batch, logits.shape[2] - 1, "logits", logits.device, "logits")
    _check_lengths("logit_lengths", logit_lengths, batch, logits.device)
    _check_lengths("target_lengths", target_lengths, batch, logits.device)


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


def check_not_negative(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


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


def check_values(
    targets: Tensor,
    encoder_lengths: Tensor,
    target_lengths: Tensor,
    *,
    max_frames: int,
    vocab_size: int,
    blanks: Sequence[int],
    lengths_name: str = "encoder_lengths",
) -> tuple[list[int], list[int]]:
    """Reads the lengths and checks them and the labels that they leave valid.

    Lengths on a device come to the host together with the verdict on the labels, in one
    synchronisation. If only the labels live on a device, they are checked there by a device-side
    assertion.

    Returns:
        T and U of each sample.
    """
    device = targets.device
    positions = torch.arange(targets.shape[1], device=device)
    valid = positions < to_device(target_lengths, device).unsqueeze(1)
    in_vocabulary = (targets >= 0) & (targets < vocab_size)
    for blank in blanks:
        in_vocabulary &= targets != blank
    all_good = (in_vocabulary | ~valid).all()

    host_lengths = encoder_lengths.device.type == target_lengths.device.type == "cpu"
    if host_lengths and device.type != "cpu":
        torch._assert_async(all_good, "targets: a label is not a token or equals blank")
        frames, labels, good = encoder_lengths.tolist(), target_lengths.tolist(), True
    else:
        parts = (encoder_lengths, target_lengths, all_good.unsqueeze(0))
        *lengths, good = torch.cat([p.to(device, torch.int64) for p in parts]).tolist()
        frames, labels = lengths[: len(targets)], lengths[len(targets) :]

    _check_range(lengths_name, frames, 1, max_frames, "frames")
    _check_range("target_lengths", labels, 0, targets.shape[1], "labels")
    if not good:
        _raise_bad_label(targets, labels, vocab_size, blanks)
    return frames, labels


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


def _check_tensor(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {tensor.dtype}")


def _check_dims(name: str, tensor: Tensor, shape: str) -> None:
    if tensor.dim() != shape.count(",") + 1 - shape.count(",)"):
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def _check_batch(name: str, batch: int) -> None:
    if batch == 0:
        raise ValueError(f"{name}: expected at least one sample, got an empty batch")


def _check_size(name: str, tensor: Tensor, dim: int, size: int, what: str) -> None:
    if tensor.shape[dim] != size:
        raise ValueError(
            f"{name}: expected size {size} in dimension {dim}, {what}, got {tuple(tensor.shape)}"
        )


def _check_device(name: str, tensor: Tensor, device: torch.device, owner: str) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name}: expected device {device}, the device of {owner}, got {tensor.device}"
        )


def _check_targets(
    targets: Tensor, batch: int, labels: int, states_owner: str, device: torch.device, owner: str
) -> None:
    _check_tensor("targets", targets, INDEX_DTYPES)
    _check_dims("targets", targets, "(B, U)")
    _check_size("targets", targets, 0, batch, f"the batch size of {owner}")
    _check_size("targets", targets, 1, labels, f"one less than the U+1 of {states_owner}")
    _check_device("targets", targets, device, owner)


def _check_lengths(name: str, lengths: Tensor, batch: int, device: torch.device) -> None:
    _check_tensor(name, lengths, INDEX_DTYPES)
    _check_dims(name, lengths, "(B,)")
    _check_size(name, lengths, 0, batch, "the batch size")
    if lengths.device.type != "cpu":
        _check_device(name, lengths, device, "the inputs (or the CPU)")
