"""What a batch's lattices are made of: lengths, labels and ranges, read and checked.

Values that live on a device are brought to the host in one synchronisation, or checked there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rnnt_op.torch_private import assert_on_device
from rnnt_op.transfer import to_device


@dataclass(frozen=True)
class Batch:
    """What a batch's lattices are made of, checked."""

    targets: Tensor  # labels, valid where u < labels[b], int64. [B, U]
    frames: Sequence[int]  # T of each sample. B
    labels: Sequence[int]  # U of each sample. B
    label_ranges: Tensor | None  # [B, T, 2]
    """A frame has nodes where label_ranges[b, t, 0] ≤ u < label_ranges[b, t, 1], u ≤ U; int64, on
    the targets' device. None: for all u ≤ U."""
    restricted_nodes: Sequence[int] | None  # nodes of each sample, None without ranges. B


def read_batch(
    targets: Tensor,
    encoder_lengths: Tensor,
    target_lengths: Tensor,
    label_ranges: Tensor | None,
    *,
    max_frames: int,
    tokens: int,
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
        tokens: number of tokens.
        blanks: those that can be no labels.
        max_states: largest number of states that a range may hold.
        lengths_name: what the caller knows ``encoder_lengths`` by.
    """
    device = targets.device
    positions = torch.arange(targets.shape[1], device=device)
    valid = positions < to_device(target_lengths, device).unsqueeze(1)
    is_bad = (targets < 0) | (targets >= tokens)
    for blank in blanks:
        is_bad |= targets == blank
    has_bad = (is_bad & valid).any(1)

    given = (encoder_lengths, target_lengths, label_ranges)
    is_on_host = all(part is None or part.device.type == "cpu" for part in given)
    place = torch.device("cpu") if is_on_host else device
    lengths = [n.to(place, torch.int64) for n in (encoder_lengths, target_lengths)]
    columns = [*lengths]
    if label_ranges is not None:
        columns += _inspect_ranges(label_ranges.to(place, torch.int64), lengths, max_states)
        label_ranges = to_device(label_ranges, device)
    if place == device or device.type != "cuda":
        columns.append(has_bad.long().to(place))
    else:
        assert_on_device(~has_bad.any(), "targets: a label is not a token or equals blank")
    frames, labels, *verdicts = torch.stack(columns).tolist()

    _check_range(lengths_name, frames, 1, max_frames, "frames")
    _check_range("target_lengths", labels, 0, targets.shape[1], "labels")
    restricted_nodes = None
    if label_ranges is not None:
        restricted_nodes, good_ranges, *verdicts = verdicts
        if not all(good_ranges):
            _raise_bad_range(label_ranges, frames, max_states)
    if verdicts and any(verdicts[0]):
        _raise_bad_label(targets, labels, tokens, blanks)
    label_ranges = None if label_ranges is None else label_ranges.long().contiguous()
    return Batch(targets.long().contiguous(), frames, labels, label_ranges, restricted_nodes)


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
    targets: Tensor, labels: list[int], tokens: int, blanks: Sequence[int]
) -> None:
    for b, (row, length) in enumerate(zip(targets.tolist(), labels, strict=True)):
        for u, label in enumerate(row[:length]):
            if not 0 <= label < tokens:
                raise ValueError(
                    f"targets: expected labels in [0, {tokens}), got {label} at sample {b}, "
                    f"position {u}"
                )
            if label in blanks:
                equal = f"equals blank ({label})" if label == blanks[0] else "is a further blank"
                raise ValueError(f"targets: label {label} at sample {b}, position {u} {equal}")
