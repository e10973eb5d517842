"""What is resolved once for an op, whatever it computes: the device's backend with its kernels, the
lattice, and the batch, read and checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rnnt_op.arguments import JointArguments, LogitsArguments, NetworkArguments
from rnnt_op.backends import serving
from rnnt_op.backends.kernels import Kernels, Result
from rnnt_op.backends.protocol import Backend
from rnnt_op.batch import Batch, read_batch
from rnnt_op.shards import Shard
from rnnt_op.topologies import resolve
from rnnt_op.topology import Topology
from rnnt_op.torch_private import process_group_named
from rnnt_op.validation import check_logits, check_network


@dataclass(frozen=True)
class Task:
    """A batch of lattices, and what serves it."""

    backend: Backend
    topology: Topology  # normalised and regularised
    blank: int
    batch: Batch
    shard: Shard | None  # this rank's columns of the logits, None: all
    normalize: bool  # whether a softmax turns logits into probabilities
    workspace_bytes: int | None


@contextmanager
def network_task(arguments: NetworkArguments, result: Result) -> Iterator[Task]:
    """Of a joint network, on its device.

    Raises:
        TypeError, ValueError: as :func:`rnnt_op.joint_rnnt_loss`.
    """
    check_network(arguments)
    fast_emit, has_dropout = 0.0, False
    if isinstance(arguments, JointArguments):
        fast_emit, has_dropout = arguments.fast_emit, arguments.dropout_seed is not None
    topology = resolve(arguments.topology, arguments.normalizer, fast_emit, arguments.delay_penalty)
    shard = _shard(arguments)
    encoder, predictor = arguments.encoder, arguments.predictor
    kernels = Kernels(
        arguments.compute_dtype,
        topology,
        logits="additive" if arguments.weight is None else "joint",
        input_dtype=encoder.dtype if encoder.dtype == predictor.dtype else None,
        activation=arguments.activation,
        has_dropout=has_dropout,
        is_restricted=arguments.label_ranges is not None,
        has_part=shard is not None,
        result=result,
    )
    device = encoder.device
    # The caller's autocast has chosen compute_dtype already; the engine's GEMMs follow that alone.
    with serving(device, kernels) as backend, torch.autocast(device.type, enabled=False):
        batch = read_batch(
            arguments.targets,
            arguments.encoder_lengths,
            arguments.target_lengths,
            arguments.label_ranges,
            max_frames=encoder.shape[1],
            tokens=topology.tokens(arguments.column_count),
            blanks=topology.blanks(arguments.blank, arguments.column_count),
        )
        if shard is not None:
            shard.check_batch(batch)
        yield Task(
            backend, topology, arguments.blank, batch, shard, True, arguments.workspace_bytes
        )


@contextmanager
def logits_task(arguments: LogitsArguments, result: Result) -> Iterator[Task]:
    """Of given logits, on their device.

    Raises:
        TypeError, ValueError: as :func:`rnnt_op.rnnt_loss`.
    """
    check_logits(arguments)
    topology = resolve(
        arguments.topology, arguments.normalizer, arguments.fast_emit, arguments.delay_penalty
    )
    logits = arguments.logits
    _, max_frames, max_states, column_count = logits.shape
    kernels = Kernels(
        logits.dtype,
        topology,
        logits="given",
        is_restricted=arguments.label_ranges is not None,
        result=result,
    )
    with serving(logits.device, kernels) as backend:
        batch = read_batch(
            arguments.targets,
            arguments.logit_lengths,
            arguments.target_lengths,
            arguments.label_ranges,
            max_frames=max_frames,
            tokens=topology.tokens(column_count),
            blanks=topology.blanks(arguments.blank, column_count),
            max_states=max_states,
            lengths_name="logit_lengths",
        )
        normalize, workspace_bytes = arguments.fused_log_softmax, arguments.workspace_bytes
        yield Task(backend, topology, arguments.blank, batch, None, normalize, workspace_bytes)


def empty_scores(arguments: LogitsArguments, are_kept: bool) -> Tensor:
    """Room for the scores of all nodes of given logits, zero in the padding, float64.
    [B, T, R, S], or none: [0]"""
    topology = resolve(
        arguments.topology, arguments.normalizer, arguments.fast_emit, arguments.delay_penalty
    )
    shape = (*arguments.logits.shape[:3], len(topology.symbols)) if are_kept else (0,)
    return arguments.logits.new_zeros(shape, dtype=torch.float64)


def _shard(arguments: NetworkArguments) -> Shard | None:
    if not arguments.process_group:
        return None
    assert arguments.weight is not None
    rows = arguments.weight.shape[0]
    group = process_group_named(arguments.process_group)
    return Shard(group, arguments.first_column, rows, arguments.all_columns)
