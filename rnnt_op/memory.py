"""Bytes that a method needs, from shapes alone."""

from __future__ import annotations

import torch


def batched_bytes(
    *, batch: int, frames: int, labels: int, vocab_size: int, joint_dim: int, dtype: torch.dtype
) -> int:
    """What the batched way holds at its peak, beyond inputs and parameters, in bytes.

    Counts what :mod:`rnnt_op.reference` holds when backward starts on the output layer: the hidden
    states, which autograd keeps, and three tensors of the logits' shape, namely logits or their
    log-softmax, the gradient of the log-softmax, and the gradient of the logits. Half dtypes keep
    the log-softmax and its gradient in float32.

    Args:
        batch: B.
        frames: T of the longest sample.
        labels: U of the longest sample.
        vocab_size: V.
        joint_dim: H.
        dtype: of the logits.
    """
    nodes = batch * frames * (labels + 1)
    log_softmax = torch.promote_types(dtype, torch.float32)
    return nodes * (
        joint_dim * dtype.itemsize + vocab_size * (dtype.itemsize + 2 * log_softmax.itemsize)
    )
