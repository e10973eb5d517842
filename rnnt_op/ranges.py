"""Label ranges, which restrict a lattice to the nodes where its paths are likely to be.

Both functions are a few torch operations: they run on any device without synchronisation, and
``torch.compile`` traces them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnt_op.inference import Posteriors
from rnnt_op.topology import RNNT, Topology
from rnnt_op.transfer import to_device


def pruned_ranges(
    posteriors: Posteriors,
    encoder_lengths: Tensor,
    target_lengths: Tensor,
    states: int,
    *,
    topology: Topology = RNNT,
) -> Tensor:
    """The states that each frame of pruned RNN-T keeps (Kuang et al. 2022, arXiv 2206.13236).

    As many consecutive states a frame as hold most of the occupancy of a cheaper lattice, moved
    where paths would break off: the first frame keeps state 0, the last one state U, a frame begins
    no earlier than the one before, and with a state of it; with its second at most, where every
    label reads a frame. So every frame is reached if T frames can hold U labels at all,
    (states − 1)·T ≥ U, or T ≥ U; else the loss is infinite.

    Args:
        posteriors: of the cheaper lattice. [B, T, U+1], [B, T, U]
        encoder_lengths: frames T of each sample, on any device. [B]
        target_lengths: labels U of each sample. [B]
        states: how many states a frame keeps, at least 2; less where U + 1 is less.
        topology: of the lattice that is to have the ranges.

    Returns:
        First state and end, int64, on the posteriors' device: ``label_ranges`` of
        :func:`rnnt_op.joint_rnnt_loss`. [B, T, 2]

    Raises:
        ValueError: states is below 2.
    """
    if states < 2:
        raise ValueError(f"states: expected at least 2, got {states}")
    blank = posteriors.blank
    device = blank.device
    frames, labels = (
        to_device(lengths, device).long().unsqueeze(1)
        for lengths in (encoder_lengths, target_lengths)
    )
    occupancy = blank + F.pad(posteriors.label, (0, 1))
    states = min(states, occupancy.shape[2])
    t = torch.arange(occupancy.shape[1], device=device)
    last = (labels + 1 - states).clamp(min=0)  # where the last frame begins

    best = occupancy.unfold(2, states, 1).sum(3).argmax(2)
    best = torch.minimum(best, last).where(t < frames - 1, last)
    # The least ranges at or above the best ones that begin with a state of the frame before; from
    # the end on, since a jump is made up for earlier.
    labels_read = all(arc.frames > 0 for arc in topology.arcs if arc.labels)
    step = 1 if labels_read else max(states - 1, 1)
    rising = best.cummax(1).values - step * t
    first = rising.flip(1).cummax(1).values.flip(1) + step * t
    first = torch.minimum(first, step * t)
    return torch.stack([first, first + states], 2)


def alignment_ranges(
    frames: Tensor,
    encoder_lengths: Tensor,
    target_lengths: Tensor,
    *,
    max_frames: int,
    early: int,
    late: int,
) -> Tensor:
    """Ranges that keep each label near its frame of an alignment: alignment-restricted RNN-T
    (Mahadeokar et al. 2021, arXiv 2011.03072).

    With the regular transducer label u may be emitted from frame frames[b, u] − early to
    frames[b, u] + late. Where a label reads a frame, as with ``modified()``, it may come that much
    earlier.

    Args:
        frames: frame of each label, not decreasing, such as ``Alignment.frames``; padding may hold
            anything. [B, U]
        encoder_lengths: frames T of each sample, on any device. [B]
        target_lengths: labels U of each sample. [B]
        max_frames: T of the encoder states.
        early: frames by which a label may come before its own, at least 0.
        late: frames by which it may come after, at least 0.

    Returns:
        First state and end, int64, on the device of ``frames``: ``label_ranges`` of
        :func:`rnnt_op.joint_rnnt_loss`. [B, max_frames, 2]

    Raises:
        ValueError: early or late is negative.
    """
    if early < 0 or late < 0:
        raise ValueError(f"early, late: expected at least 0 frames each, got {early}, {late}")
    device = frames.device
    labels = to_device(target_lengths, device).long().unsqueeze(1)
    last = to_device(encoder_lengths, device).long().unsqueeze(1) - 1
    is_label = torch.arange(frames.shape[1], device=device) < labels
    frames = torch.minimum(frames.long().clamp(min=0), last)
    t = torch.arange(max_frames, device=device).expand(len(frames), -1).contiguous()
    beyond = torch.iinfo(torch.int64).max
    first_late = (frames + late + 1).masked_fill(~is_label, beyond)
    first_early = (frames - early).masked_fill(~is_label, beyond)
    # Labels that must have been emitted before a frame, and labels that may have been on it.
    low = torch.searchsorted(first_late, t, right=True)
    high = torch.searchsorted(first_early, t, right=True) + 1
    return torch.stack([low, high], 2)
