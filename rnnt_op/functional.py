"""The losses: defaults, argument checks, and which op serves the call."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rnnt_op import validation
from rnnt_op.arguments import JointArguments, LogitsArguments, NetworkArguments
from rnnt_op.logits import accumulation_dtype
from rnnt_op.shards import local_output_layer
from rnnt_op.topology import RNNT, Topology
from rnnt_op.torch_library_registration import autograd


def joint_rnnt_loss(
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
    fast_emit: float = 0,  # not 0.0: torch.compile would first take a float for an input
    delay_penalty: float = 0,
    clamp: float = -1,
    label_ranges: Tensor | None = None,
    activation: str = "tanh",
    dropout: float = 0,
    reduction: str = "mean",
    gradient_tolerance: float | None = None,
    workspace_bytes: int | None = None,
    zero_infinity: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Transducer loss of a joint network with its output layer, without a (B, T, U, V) tensor.

    .. code-block:: text

        logits[b, t, u] = weight · act(encoder[b, t] + predictor[b, u]) + bias
        loss[b]         = −log Σ_paths Π softmax(logits)[blank or next label]

    The sum runs over all paths from (0, 0) to a blank at (T−1, U) (Graves 2012, arXiv 1211.3711,
    eq. 1 and 16-18). Losses and gradients are computed sample-wise (Braun, McDermott, Hsiao 2023,
    arXiv 2211.16270): peak memory is inputs, gradients and ``workspace_bytes``, whatever B, T, U
    and V are. Traced by ``torch.compile`` as one op.

    With ``reduction="mean"`` or ``"sum"`` gradients come out of the forward sweep and backward
    only scales them. With ``"none"``, and for float16, whose unit-scale gradients would underflow
    before a gradient scaler's factor arrives, the backward recomputes.

    Under ``torch.autocast`` the GEMMs run in the autocast dtype; losses and accumulators stay
    float32, and every gradient has its input's dtype.

    Args:
        encoder: encoder states, float64, float32, bfloat16 or float16. [B, T, H]
        predictor: predictor states; position u has seen u labels. [B, U+1, H]
        weight: output layer. [V, H] It may be spread over ranks, as a DTensor with placement
            Shard(0), or as this rank's rows of ``process_group``; the bias then is, too. Or None:
            there is no output layer, and the logits are encoder + predictor (so V = H), which costs
            no GEMM.
        bias: output layer's bias. [V] or None
        targets: labels, int32 or int64; padding may hold anything. [B, U]
        encoder_lengths: frames T of each sample, 1 to T, int32 or int64; on the CPU (no device
            synchronisation) or on the device. [B]
        target_lengths: labels U of each sample, 0 to U. [B]
        blank: index of the blank token; negative counts from the end of the tokens.
        topology: which arcs a lattice has, of ``rnnt_op.topologies``. The regular transducer, or
            ``modified()``, ``constrained()``, ``multi_blank()``, ``tdt()``, whose columns of
            durations follow the tokens in ``weight`` and ``bias``.
        normalizer: ``"softmax"`` over all tokens, or ``"hat"``: the blank's probability is the
            sigmoid of its logit, and the other tokens share the rest by a softmax of their own.
        fast_emit: λ of FastEmit (Yu et al. 2021, arXiv 2010.11148): in gradients, arcs that emit a
            label count 1 + λ times. The loss stays that of λ = 0.
        delay_penalty: λ; the log-probability of a label at frame t grows by λ·((T − 1)/2 − t) (Kang
            et al. 2023, arXiv 2211.00490), in the loss, too.
        clamp: if positive, elements of each sample's logit gradient are clamped to [−clamp, clamp],
            before the upstream gradient multiplies them.
        label_ranges: which nodes there are, int32 or int64, on the CPU or on the device: on frame t
            those of states label_ranges[b, t, 0] ≤ u < label_ranges[b, t, 1], where u labels have
            been emitted; what goes beyond U is ignored. All others take no memory and no time, and
            no path passes them. None: all. See ``rnnt_op.pruned_ranges`` and
            ``rnnt_op.alignment_ranges``. [B, T, 2]
        activation: ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"leaky_relu"``, ``"hardtanh"``,
            ``"silu"``, ``"gelu"`` (with erf) or ``"identity"``, which is the only one without
            ``weight``; as in torch.nn.functional, with its defaults. Others are written behind the
            name: ``"leaky_relu(0.2)"``, ``"hardtanh(-2, 2)"``.
        dropout: probability with which an element of the joint network's hidden states is dropped,
            in [0, 1). The mask is drawn anew by every call, from torch's default generator, for
            every node of its own, and is computed again in backward instead of being stored.
        reduction: ``"none"`` (losses of the samples), ``"sum"``, or ``"mean"`` over the batch.
        gradient_tolerance: share of each sample's logit-gradient L1 norm that may be skipped, in
            [0, 1): nodes that the backward pass leaves out, and on a CPU nodes that are not scored
            because paths hardly reach them. None: a 128th of the GEMM dtype's rounding unit. 0.0:
            score every node, and skip nothing but elements below 2^-100, 7.9e-31 (2^-996 for
            float64), which are zero at any tolerance.
        workspace_bytes: temporary memory the op may use. None: 256 MiB, on a GPU 512 MiB. One
            sample's lattice, 56 bytes a node, is the least it can work with.
        zero_infinity: set losses that are not finite, and their samples' gradients, to zero.
            Without it such a sample returns its infinite or NaN loss, its rows of the encoder's
            and predictor's gradients are NaN, and so are the gradients of weight and bias, to
            which all samples contribute. The encoder's and predictor's rows of other samples are
            exact either way. With reduction="none", a sample whose upstream gradient is zero
            contributes exactly zero.
        process_group: ranks that share the vocabulary: each has as many rows of ``weight`` and
            ``bias``, in the order of ranks, and the same in all other arguments. None where
            ``weight`` is whole, or a DTensor, which knows its ranks. All of them take part in
            forward and backward.

    Returns:
        The loss in nats, float32 (float64 for float64 inputs). [B] or []

    Raises:
        TypeError: an argument has the wrong type or dtype, or is a DTensor that it may not be.
        ValueError: shapes or devices do not match, a length or label is out of range, or a label
            equals blank.
        RuntimeError: second derivatives or forward-mode AD are asked for.
    """
    validation.check_options(reduction=reduction)
    joint = checked_network(
        JointArguments(
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
            fast_emit=fast_emit,
            clamp=clamp,
            dropout=dropout,
            gradient_tolerance=gradient_tolerance,
            zero_infinity=zero_infinity,
        ),
        topology,
        process_group,
    )
    if dropout:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=encoder.device)
        joint = replace(joint, dropout_seed=seed)
    leaves = (encoder, predictor, joint.weight, joint.bias)
    given = [leaf for leaf in leaves[:3] if leaf is not None]
    underflows = torch.float16 in (joint.compute_dtype, *[leaf.dtype for leaf in given])
    if reduction == "none" or underflows:
        return _reduce(torch.ops.rnnt_op.joint_loss(*joint.values()), reduction)

    batch, dtype = encoder.shape[0], accumulation_dtype(joint.compute_dtype)
    loss_weights = torch.ones(batch, dtype=dtype, device=encoder.device)
    if reduction == "mean":
        loss_weights = loss_weights / batch
    wanted = [autograd.needs_gradient(leaf) for leaf in leaves]
    loss: Tensor = autograd.joint_loss_alone(loss_weights, *joint.values(), wanted)
    return loss


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = -1,
    clamp: float = -1,
    reduction: str = "mean",
    fused_log_softmax: bool = True,
    *,
    topology: Topology = RNNT,
    normalizer: str = "softmax",
    fast_emit: float = 0,
    delay_penalty: float = 0,
    label_ranges: Tensor | None = None,
    zero_infinity: bool = False,
    workspace_bytes: int | None = None,
) -> Tensor:
    r"""Transducer loss of given logits; a drop-in for ``torchaudio.functional.rnnt_loss``.

    Beyond torchaudio: bfloat16 and float64, int64 indices, more than 2³¹ elements, any strides,
    lengths on the CPU, recursions in float64, and tensors longer than the longest sample. The loss
    of a (B, T, U, V) tensor needs that tensor; ``joint_rnnt_loss`` does not. Until the gradient is
    computed, 8 bytes are kept for each symbol of each node (16 for a blank and a label), if that is
    no more than a 16th of the logits.

    Args:
        logits: float64, float32, bfloat16 or float16. [B, T, U+1, V], or with ``label_ranges``
            those of the nodes that there are, row u − label_ranges[b, t, 0] of a frame for state u,
            and R rows at least as many as the widest range has states. [B, T, R, V]
        targets: labels, int32 or int64; padding may hold anything. [B, U]
        logit_lengths: frames T of each sample, 1 to T, on the CPU or on the device. [B]
        target_lengths: labels U of each sample, 0 to U. [B]
        blank: index of the blank token; negative counts from the end.
        clamp: if positive, elements of the gradient of each sample's loss are clamped to [−clamp,
            clamp], before the upstream gradient multiplies them.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` over the batch.
        fused_log_softmax: False if ``logits`` are log-probabilities already; the gradient is then
            that of the log-probabilities, −occupancy at blank and next label and zero elsewhere.
        topology, normalizer, fast_emit, delay_penalty, label_ranges: as in ``joint_rnnt_loss``.
        zero_infinity: as in ``joint_rnnt_loss``; without it the gradient of a sample whose loss is
            not finite is NaN on its nodes.
        workspace_bytes: as in ``joint_rnnt_loss``.

    Returns:
        The loss in nats, float32 (float64 for float64 logits). [B] or []

    Raises:
        TypeError, ValueError, RuntimeError: as in ``joint_rnnt_loss``.
    """
    validation.check_options(reduction=reduction)
    given = LogitsArguments(
        logits=logits,
        targets=targets,
        logit_lengths=logit_lengths,
        target_lengths=target_lengths,
        label_ranges=label_ranges,
        blank=blank,
        topology=topology_text(topology),
        normalizer=normalizer,
        delay_penalty=delay_penalty,
        fast_emit=fast_emit,
        clamp=clamp,
        fused_log_softmax=fused_log_softmax,
        zero_infinity=zero_infinity,
        workspace_bytes=workspace_bytes,
    )
    validation.check_logits(given)
    validation.check_options(**given.options())
    given = replace(given, blank=validation.check_columns(topology, blank, logits.shape[3]))
    keeps_scores = autograd.needs_gradient(logits) and _scores_are_small(topology, logits)
    losses, _ = torch.ops.rnnt_op.logits_loss(*given.values(), keeps_scores)
    return _reduce(losses, reduction)


def _scores_are_small(topology: Topology, logits: Tensor) -> bool:
    """Whether scores that are kept for the gradients take no more than a 16th of the logits."""
    return 16 * 8 * len(topology.symbols) <= logits.shape[3] * logits.itemsize


def topology_text(topology: Topology) -> str:
    validation.check_topology(topology)
    return topology.text


N = TypeVar("N", bound=NetworkArguments)


def checked_network(network: N, topology: Topology, process_group: ProcessGroup | None) -> N:
    """The arguments as the op takes them: with this rank's part of the output layer, the dtype of
    the GEMMs, and the blank counted from the beginning."""
    network = local_output_layer(network, process_group)
    validation.check_network(network)
    validation.check_options(**network.options())
    encoder, weight, bias = network.encoder, network.weight, network.bias
    if weight is None:
        validation.check_without_weight(**network.options())
    blank = validation.check_columns(topology, network.blank, network.column_count)
    compute_dtype, device = encoder.dtype, encoder.device.type
    # There is no autocast of meta tensors to ask for.
    is_autocast = device != "meta" and torch.is_autocast_enabled(device)
    if is_autocast and compute_dtype != torch.float64:
        compute_dtype = torch.get_autocast_dtype(device)
    else:
        validation.check_same_dtype(
            encoder=encoder, predictor=network.predictor, weight=weight, bias=bias
        )
    return replace(network, blank=blank, compute_dtype=compute_dtype)


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses
