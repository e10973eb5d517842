"""What a lattice says of its labels: how probable each arc is, and the most probable path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rnnt_op.arguments import NetworkArguments
from rnnt_op.functional import checked_network, topology_text
from rnnt_op.topology import RNNT, Topology
from rnnt_op.transfer import to_device


class Posteriors(NamedTuple):
    """What :func:`posteriors` returns."""

    blank: Tensor
    """Probability that the path reads a frame by a blank of node (t, u); zero where there is no
    node. [B, T, U+1]"""
    label: Tensor
    """Probability that label u is emitted on frame t; sums to one over t. [B, T, U]"""
    log_likelihood: Tensor
    """log P(targets | encoder), minus the loss. [B]"""
    confidence: Tensor
    """P(targets | encoder)^(1 / (U + 1)): by the chain rule the geometric mean of the probabilities
    of each label, and of the end, given the labels before it. [B]"""


def posteriors(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    encoder_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int = 0,
    topology: Topology = RNNT,
    normalizer: str = "softmax",
    delay_penalty: float = 0,
    label_ranges: Tensor | None = None,
    activation: str = "tanh",
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Posteriors:
    """Where the labels of each sample are: how probable each arc of its lattice is, given targets.

    One score pass and one forward-backward pass, sample-wise, without logits in memory. Not
    differentiable. A sample without a path has no occupancies, and confidence zero.

    Args:
        encoder, predictor, weight, bias, targets, encoder_lengths, target_lengths, blank, topology,
            normalizer, delay_penalty, label_ranges, activation, workspace_bytes, process_group: as
            in :func:`joint_rnnt_loss`.

    Returns:
        Occupancies, log-likelihood and confidence, float32 (float64 for float64 inputs). Blanks are
        those of any duration; with ``constrained()`` the blank behind a label is part of the label.

    Raises:
        TypeError, ValueError: as in :func:`joint_rnnt_loss`.
        RuntimeError: a derivative is asked for.
    """
    network = checked_network(
        NetworkArguments(
            encoder=encoder,
            predictor=predictor,
            weight=weight,
            bias=bias,
            targets=targets,
            encoder_lengths=encoder_lengths,
            target_lengths=target_lengths,
            label_ranges=label_ranges,
            blank=blank,
            topology=topology_text(topology),
            normalizer=normalizer,
            delay_penalty=delay_penalty,
            activation=activation,
            workspace_bytes=workspace_bytes,
        ),
        topology,
        process_group,
    )
    occupancies, log_likelihood = torch.ops.rnnt_op.posteriors(*network.values())
    symbols = to_device(target_lengths, log_likelihood.device) + 1
    return Posteriors(
        occupancies[..., 0],
        occupancies[:, :, :-1, 1],
        log_likelihood,
        (log_likelihood / symbols).exp(),
    )


class Alignment(NamedTuple):
    """What :func:`align` returns."""

    frames: Tensor
    """Frame t on which each label is emitted, −1 in the padding and where a sample has no path;
    int64. [B, U]"""
    log_probability: Tensor
    """Of the path, −∞ where there is none. [B]"""


def align(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    encoder_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int = 0,
    topology: Topology = RNNT,
    normalizer: str = "softmax",
    delay_penalty: float = 0,
    label_ranges: Tensor | None = None,
    activation: str = "tanh",
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Alignment:
    """The most probable path of each sample: when each label is emitted (forced alignment).

    One score pass and the Viterbi recursion, sample-wise, without logits in memory. Not
    differentiable.

    Args:
        encoder, predictor, weight, bias, targets, encoder_lengths, target_lengths, blank, topology,
            normalizer, delay_penalty, label_ranges, activation, workspace_bytes, process_group: as
            in :func:`joint_rnnt_loss`.

    Returns:
        Frames, and the path's log-probability, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as in :func:`joint_rnnt_loss`.
        RuntimeError: a derivative is asked for.
    """
    network = checked_network(
        NetworkArguments(
            encoder=encoder,
            predictor=predictor,
            weight=weight,
            bias=bias,
            targets=targets,
            encoder_lengths=encoder_lengths,
            target_lengths=target_lengths,
            label_ranges=label_ranges,
            blank=blank,
            topology=topology_text(topology),
            normalizer=normalizer,
            delay_penalty=delay_penalty,
            activation=activation,
            workspace_bytes=workspace_bytes,
        ),
        topology,
        process_group,
    )
    return Alignment(*torch.ops.rnnt_op.align(*network.values()))
