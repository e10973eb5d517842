"""Bytes that each way to train a transducer holds at its peak, and what its time is made of.

All of it follows from shapes: nothing runs, and the device need not exist. The ways are those that
Braun et al. 2022 (arXiv 2211.16270) compare, and this one; ``docs/complexity.md`` derives what is
computed here, and :mod:`rnnt_op.tools.study.methods` has the code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rnnt_op.moments import (
    MOMENTS,
    PART_SAMPLES,
    Held,
    Workload,
    inputs,
    planned,
    total,
)

__all__ = [
    "METHODS",
    "Cost",
    "Held",
    "Workload",
    "batched_bytes",
    "cost",
    "held",
    "largest_batch",
    "peak_bytes",
]

METHODS = tuple(name for name in MOMENTS if name != "torchaudio")


@dataclass(frozen=True)
class Cost:
    """What the time of loss and gradients is made of."""

    gemm_flops: float  # of the output layer: logits, and the gradients of weight and hidden states
    bytes_moved: float  # read and written outside GEMMs, of logits, hidden states and their likes
    sequential_steps: int  # anti-diagonals of lattices that wait for one another


def held(
    method: str, workload: Workload, *, workspace_bytes: int | None = None, device: str = "cpu"
) -> tuple[Held, ...]:
    """What is alive at the peak of loss and gradients, inputs included.

    Gradients are there as far as they have been computed by then.

    Args:
        method: one of ``METHODS``, or ``"torchaudio"``.
        workload: the batch. At least one sample.
        workspace_bytes: that of rnnt_op, None for the default.
        device: a device type, whose backend plans rnnt_op's workspace.

    Raises:
        ValueError: no such method.
    """
    if method not in MOMENTS:
        raise ValueError(f"method: expected one of {', '.join(MOMENTS)}, got {method!r}")
    moments = list(MOMENTS[method](workload, workspace_bytes, device))
    return inputs(workload) + max(moments, key=total)


def peak_bytes(
    method: str, workload: Workload, *, workspace_bytes: int | None = None, device: str = "cpu"
) -> int:
    """Sum over ``held``, whose arguments it takes."""
    return total(held(method, workload, workspace_bytes=workspace_bytes, device=device))


def largest_batch(
    method: str,
    workload_of: Callable[[int], Workload],
    memory_bytes: int,
    *,
    workspace_bytes: int | None = None,
    device: str = "cpu",
) -> int:
    """The largest batch whose peak fits in memory, 0 if one sample does not.

    Args:
        method, workspace_bytes, device: as in ``held``.
        workload_of: the workload of a number of samples, which grows with it.
        memory_bytes: what fits.
    """

    def needed(batch: int) -> int:
        workload = workload_of(batch)
        return peak_bytes(method, workload, workspace_bytes=workspace_bytes, device=device)

    fits, bytes_of_fit = 0, 0
    too_large: int | None = None
    guess = tried = 1
    while too_large is None or too_large - fits > 1:
        found = needed(guess)
        slope = max(1.0, (found - bytes_of_fit) / (guess - fits))
        if found > memory_bytes:
            too_large = guess
        else:
            fits, bytes_of_fit = guess, found
        # Peaks grow almost evenly, so this is nearly right; where they do not, halves end it.
        guess = fits + max(1, int((memory_bytes - bytes_of_fit) / slope))
        if too_large is not None:
            middle = (fits + too_large) // 2
            guess = max(fits + 1, middle) if tried % 4 == 0 else min(guess, too_large - 1)
        tried += 1
    return fits


def batched_bytes(
    *, batch: int, frames: int, labels: int, vocab_size: int, joint_dim: int, dtype: torch.dtype
) -> int:
    """What the batched way holds at its peak, beyond inputs and parameters, in bytes.

    Args:
        batch: B.
        frames: T of the longest sample.
        labels: U of the longest sample.
        vocab_size: V.
        joint_dim: H.
        dtype: of the logits.
    """
    workload = Workload.uniform(
        batch, frames, labels, vocab_size=vocab_size, joint_dim=joint_dim, dtype=dtype
    )
    return peak_bytes("batched", workload) - total(inputs(workload))


def cost(
    method: str,
    workload: Workload,
    kept: float = 1.0,
    *,
    workspace_bytes: int | None = None,
    device: str = "cpu",
) -> Cost:
    """What the time of loss and gradients is made of.

    Args:
        method: one of ``METHODS``.
        workload: the batch.
        kept: κ, the share of nodes whose gradient rnnt_op computes.
        workspace_bytes, device: as in ``held``.
    """
    if method in PART_SAMPLES:
        parts = workload.parts(PART_SAMPLES[method]).items()
        costs = [(cost("batched", part), count) for part, count in parts]
        return Cost(
            sum(each.gemm_flops * count for each, count in costs),
            sum(each.bytes_moved * count for each, count in costs),
            sum(each.sequential_steps * count for each, count in costs),
        )
    is_packed = method in ("padding-free", "rnnt_op")
    nodes = workload.nodes if is_packed else workload.padded_nodes
    product = 2.0 * nodes * workload.vocab_size * workload.joint_dim
    item, real = workload.dtype.itemsize, workload.real_dtype.itemsize
    logits, hidden = nodes * workload.vocab_size * item, nodes * workload.joint_dim * item
    if method == "rnnt_op":
        groups, _ = planned(workload, workspace_bytes, device)
        steps = sum(max(t + s - 1 for t, s in zip(g.frames, g.states, strict=True)) for g in groups)
        # Hidden states written; logits read. Of the nodes kept: both again, and their gradients.
        moved = (1 + 3 * kept) * (logits + hidden)
        return Cost((1 + 3 * kept) * product, moved, steps)
    # Hidden states: a sum, tanh, its derivative, and a sum for the encoder and the predictor each.
    moved = 8.0 * hidden
    if method in ("batched", "padding-free"):
        # Log-softmax, its two gradients, their sum, the softmax's derivative, the bias's gradient.
        moved += 2 * logits + 9 * logits * real / item
        if not is_packed:
            # Labels end at U: their gradient is made without the last state, then with it.
            moved += 2 * logits * real / item * workload.labels / (workload.labels + 1)
        if real != item:
            # To the softmax's dtype and back.
            moved += logits + 3 * logits * real / item
    else:
        # The scores read logits, the gradient reads and writes them, the bias's gradient reads it.
        moved += 4 * logits
    return Cost(3 * product, moved, 2 * (workload.frames + workload.labels))
