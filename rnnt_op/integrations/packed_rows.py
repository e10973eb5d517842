"""Logits of packed nodes, as warp-rnnt and optimized_transducer take them, in a padded tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def unpacked(
    rows: Tensor, frame_lengths: Tensor, label_lengths: Tensor, labels: int, name: str
) -> Tensor:
    """Copies rows into a padded tensor; differentiable.

    Args:
        rows: those of the first sample first, in it those of the first frame, in it by labels
            emitted. [Σ T (U+1), V]
        frame_lengths: frames T of each sample; read on the CPU. [B]
        label_lengths: labels U of each sample. [B]
        labels: largest U of the result.
        name: what errors call the rows.

    Returns:
        The rows, and zeros where there are none. [B, T, U+1, V]

    Raises:
        ValueError: rows are not as many as the lengths say.
    """
    frames, device = int(frame_lengths.max()), rows.device
    t = torch.arange(frames, device=device) < frame_lengths.to(device).unsqueeze(1)
    u = torch.arange(labels + 1, device=device) <= label_lengths.to(device).unsqueeze(1)
    is_node = t.unsqueeze(2) & u.unsqueeze(1)
    expected = int(is_node.sum())
    if rows.dim() != 2 or rows.shape[0] != expected:
        raise ValueError(
            f"{name}: expected shape ({expected}, V), a row for each frame and each number of "
            f"labels emitted, got {tuple(rows.shape)}"
        )
    padded = rows.new_zeros(*is_node.shape, rows.shape[1])
    return padded.index_put((is_node,), rows)
