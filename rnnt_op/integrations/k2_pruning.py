"""Which states k2's pruned loss keeps (Kuang et al. 2022, arXiv 2206.13236, section 3.2).

Interface: k2 1.24.4, ``k2/rnnt_loss.py``; fast_rnnt 1.3 has the same, without the deprecated one.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F


def get_rnnt_prune_ranges(
    px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int
) -> Tensor:
    """States that the pruned loss keeps, chosen as k2 1.24.4 chooses them.

    On each frame the consecutive states that a path most probably enters at or above the first of
    and leaves the frame from. They are then moved, down to where no later frame begins below, and
    up to where those of the next frames can be reached; the first frame begins at 0.

    Args:
        px_grad: occupancies of labels. [B, S, T+1] or [B, S, T]
        py_grad: occupancies of blanks. [B, S+1, T]
        boundary: [0, 0, S, T] of each sample; read, so best on the CPU. [B, 4]
        s_range: R, how many states a frame keeps; less where S + 1 is less. Where labels read no
            frame, it is widened to what leaves every sample a path, ⌈S / T⌉ + 1, with a warning.

    Returns:
        The states, int64. [B, T, R]

    Raises:
        ValueError: s_range is too small for any path.
    """
    _check_range(px_grad, py_grad, s_range)
    if px_grad.shape[2] > py_grad.shape[2]:
        labels, lengths = boundary[:, 2], boundary[:, 3]
        # A frame begins at most R − 1 above the one before, so T frames reach up to T · (R − 1).
        least = int(((labels + lengths - 1) // lengths).max()) + 1
        if s_range < least:
            warnings.warn(
                f"s_range: {s_range} leaves no path to a sample with many labels for its frames; "
                f"widened to {least}, as k2 does",
                stacklevel=2,
            )
            s_range = least
    s_range = min(s_range, py_grad.shape[1])
    frames = py_grad.shape[2]
    entered = F.pad(px_grad[:, :, :frames], (0, 0, 1, 0))[:, : py_grad.shape[1] - s_range + 1]
    best = (py_grad.unfold(1, s_range, 1).sum(3) - entered).argmax(1)
    return _connected(best, boundary, s_range, px_grad.shape[2] == frames)


def get_rnnt_prune_ranges_deprecated(
    px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int
) -> Tensor:
    """:func:`get_rnnt_prune_ranges` as it was: the consecutive states of a frame with the largest
    sum of all occupancies, and ``s_range`` is not widened.

    Args:
        px_grad, py_grad, boundary, s_range: as there.

    Returns:
        The states, int64. [B, T, R]

    Raises:
        ValueError: s_range is too small for any path.
    """
    _check_range(px_grad, py_grad, s_range)
    s_range = min(s_range, py_grad.shape[1])
    frames = py_grad.shape[2]
    passed = F.pad(px_grad[:, :, :frames], (0, 0, 0, 1)) + py_grad
    best = passed.unfold(1, s_range, 1).sum(3).argmax(1)
    return _connected(best, boundary, s_range, px_grad.shape[2] == frames)


def _check_range(px_grad: Tensor, py_grad: Tensor, s_range: int) -> None:
    least = 1 if px_grad.shape[2] == py_grad.shape[2] else 2
    if s_range < least:
        raise ValueError(f"s_range: expected at least {least}, got {s_range}")


def _connected(best: Tensor, boundary: Tensor, s_range: int, label_reads_frame: bool) -> Tensor:
    """The states of each frame, moved so that paths lead through them to the last label.

    Args:
        best: first state of each frame, as occupancies alone would have it. [B, T]
    """
    device = best.device
    t = torch.arange(best.shape[1], device=device)
    _, _, labels, lengths = boundary.to(device).unsqueeze(2).unbind(1)
    last = (labels - s_range + 1).clamp(min=0)
    first = best.where(t < lengths - 1, last)
    first = -_cummax_from_end(-first)
    step = 1 if label_reads_frame else s_range - 1
    # A frame begins at most a step above the one before; the first one begins at 0.
    first = torch.minimum(_cummax_from_end(first - step * t), torch.zeros_like(t)) + step * t
    return first.unsqueeze(2) + torch.arange(s_range, device=device)


def do_rnnt_pruning(am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Encoder and predictor states of the nodes that ``ranges`` keep, for a joint network.

    Args:
        am: encoder states. [B, T, H]
        lm: predictor states. [B, S+1, H']
        ranges: states of each frame. [B, T, R]

    Returns:
        Both, [B, T, R, H] and [B, T, R, H'].
    """
    states = ranges.flatten(1).unsqueeze(2).expand(-1, -1, lm.shape[2])
    return (
        am.unsqueeze(2).expand(-1, -1, ranges.shape[2], -1),
        lm.gather(1, states).unflatten(1, ranges.shape[1:]),
    )


def label_ranges(ranges: Tensor) -> Tensor:
    """First state and end, ``label_ranges`` of :func:`rnnt_op.joint_rnnt_loss`, [B, T, 2], of the
    consecutive states of each frame, [B, T, R]."""
    return torch.stack([ranges[:, :, 0], ranges[:, :, -1] + 1], 2)


def _cummax_from_end(values: Tensor) -> Tensor:
    return values.flip(1).cummax(1).values.flip(1)
