"""Modules that own the layers of the joint network, so that DDP, FSDP and torch.compile wrap them
like any layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rnnt_op import validation
from rnnt_op.activations import activate
from rnnt_op.functional import joint_rnnt_loss
from rnnt_op.inference import Alignment, Posteriors, align, posteriors
from rnnt_op.topologies import resolve
from rnnt_op.topology import RNNT, Topology
from rnnt_op.torch_private import weight_hooks
from rnnt_op.validation import is_dtensor


class JointRNNTLoss(nn.Module):
    """The joint network's layers and its transducer loss.

    Owns ``weight`` [V, H] and ``bias`` [V], initialised as ``nn.Linear`` does; V counts the
    topology's columns of durations, too. They may be made DTensors with placement Shard(0):
    each rank then has some of the rows (``docs/distributed.md``). With ``encoder_dim`` or
    ``predictor_dim`` it also owns ``encoder_projection`` [H, encoder_dim] or
    ``predictor_projection``, an ``nn.Linear`` with bias, which all of its methods apply to what
    they are given.

    Args:
        joint_dim: H, the dimension of the hidden states.
        vocab_size: number of tokens, blank included.
        encoder_dim: dimension of the encoder states, which are projected to H. None: it is H, and
            they are not projected.
        predictor_dim: as ``encoder_dim``, of the predictor states.
        bias: whether the output layer has a bias.
        blank, topology, normalizer, fast_emit, delay_penalty, clamp, activation, reduction,
            gradient_tolerance, workspace_bytes, zero_infinity: as in
            :func:`rnnt_op.joint_rnnt_loss`.
        dropout: as there, in training mode; none in evaluation mode.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        joint_dim: int,
        vocab_size: int,
        *,
        encoder_dim: int | None = None,
        predictor_dim: int | None = None,
        bias: bool = True,
        blank: int = 0,
        topology: Topology = RNNT,
        normalizer: str = "softmax",
        fast_emit: float = 0,
        delay_penalty: float = 0,
        clamp: float = -1,
        activation: str = "tanh",
        dropout: float = 0,
        reduction: str = "mean",
        gradient_tolerance: float | None = None,
        workspace_bytes: int | None = None,
        zero_infinity: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        validation.check_topology(topology)
        columns = vocab_size + topology.extra_columns
        validation.check_columns(topology, blank, columns)
        validation.check_options(
            normalizer=normalizer,
            fast_emit=fast_emit,
            delay_penalty=delay_penalty,
            clamp=clamp,
            activation=activation,
            dropout=dropout,
            reduction=reduction,
            gradient_tolerance=gradient_tolerance,
            workspace_bytes=workspace_bytes,
        )
        resolve(topology.text, normalizer, fast_emit, delay_penalty)
        self.joint_dim = joint_dim
        self.encoder_dim = encoder_dim
        self.predictor_dim = predictor_dim
        self.vocab_size = vocab_size
        self.blank = blank
        self.topology = topology
        self.normalizer = normalizer
        self.fast_emit = fast_emit
        self.delay_penalty = delay_penalty
        self.clamp = clamp
        self.activation = activation
        self.dropout = dropout
        self.reduction = reduction
        self.gradient_tolerance = gradient_tolerance
        self.workspace_bytes = workspace_bytes
        self.zero_infinity = zero_infinity
        self.weight = nn.Parameter(torch.empty(columns, joint_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(columns, device=device, dtype=dtype)) if bias else None
        self.encoder_projection, self.predictor_projection = (
            None if dim is None else nn.Linear(dim, joint_dim, device=device, dtype=dtype)
            for dim in (encoder_dim, predictor_dim)
        )
        self._reset_output_layer()

    def reset_parameters(self) -> None:
        """Draws all parameters anew, those of the projections, too."""
        for projection in (self.encoder_projection, self.predictor_projection):
            if projection is not None:
                projection.reset_parameters()
        self._reset_output_layer()

    def _reset_output_layer(self) -> None:
        bound = 1 / math.sqrt(self.joint_dim)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        encoder: Tensor,
        predictor: Tensor,
        targets: Tensor,
        encoder_lengths: Tensor,
        target_lengths: Tensor,
        label_ranges: Tensor | None = None,
    ) -> Tensor:
        """Loss of a batch; arguments and result as in :func:`rnnt_op.joint_rnnt_loss`."""
        return joint_rnnt_loss(
            *self._projected(encoder, predictor),
            self.weight,
            self.bias,
            targets,
            encoder_lengths,
            target_lengths,
            **self._lattice_options(),
            label_ranges=label_ranges,
            fast_emit=self.fast_emit,
            clamp=self.clamp,
            dropout=self.dropout if self.training else 0,
            reduction=self.reduction,
            gradient_tolerance=self.gradient_tolerance,
            zero_infinity=self.zero_infinity,
        )

    def posteriors(
        self,
        encoder: Tensor,
        predictor: Tensor,
        targets: Tensor,
        encoder_lengths: Tensor,
        target_lengths: Tensor,
        label_ranges: Tensor | None = None,
    ) -> Posteriors:
        """Where the labels are; arguments and result as in :func:`rnnt_op.posteriors`."""
        self._call_weight_hooks()
        return posteriors(
            *self._projected(encoder, predictor),
            self.weight,
            self.bias,
            targets,
            encoder_lengths,
            target_lengths,
            **self._lattice_options(),
            label_ranges=label_ranges,
        )

    def align(
        self,
        encoder: Tensor,
        predictor: Tensor,
        targets: Tensor,
        encoder_lengths: Tensor,
        target_lengths: Tensor,
        label_ranges: Tensor | None = None,
    ) -> Alignment:
        """The most probable path; arguments and result as in :func:`rnnt_op.align`."""
        self._call_weight_hooks()
        return align(
            *self._projected(encoder, predictor),
            self.weight,
            self.bias,
            targets,
            encoder_lengths,
            target_lengths,
            **self._lattice_options(),
            label_ranges=label_ranges,
        )

    def _projected(self, encoder: Tensor, predictor: Tensor) -> tuple[Tensor, Tensor]:
        """States of dimension H. [..., H]"""
        for states, name, dim in (
            (encoder, "encoder", self.encoder_dim),
            (predictor, "predictor", self.predictor_dim),
        ):
            validation.check_states(name, states, self.joint_dim, dim)
        if self.encoder_projection is not None:
            encoder = self.encoder_projection(encoder)
        if self.predictor_projection is not None:
            predictor = self.predictor_projection(predictor)
        return encoder, predictor

    def _call_weight_hooks(self) -> None:
        for hook in weight_hooks(self):
            hook(self, ())

    def _lattice_options(self) -> dict[str, Any]:
        return {
            "blank": self.blank,
            "topology": self.topology,
            "normalizer": self.normalizer,
            "delay_penalty": self.delay_penalty,
            "activation": self.activation,
            "workspace_bytes": self.workspace_bytes,
        }

    def logits(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """Logits of the joint network, for decoding; on all ranks that share the output layer.

        Args:
            encoder: encoder states. [..., H], or [..., encoder_dim]
            predictor: predictor states, broadcast against ``encoder``. [..., H], or
                [..., predictor_dim]

        Returns:
            Logits. [..., V]
        """
        self._call_weight_hooks()
        weight, bias = (
            parameter.full_tensor() if is_dtensor(parameter) else parameter
            for parameter in (self.weight, self.bias)
        )
        assert weight is not None
        encoder, predictor = self._projected(encoder, predictor)
        return F.linear(activate(encoder + predictor, self.activation), weight, bias)

    def extra_repr(self) -> str:
        shown = {
            "joint_dim": self.joint_dim,
            "vocab_size": self.vocab_size,
            "bias": self.bias is not None,
            "blank": self.blank,
            "activation": self.activation,
            "reduction": self.reduction,
        }
        if self.topology != RNNT:
            shown["topology"] = self.topology
        if self.normalizer != "softmax":
            shown["normalizer"] = self.normalizer
        for name in ("dropout", "fast_emit", "delay_penalty"):
            if getattr(self, name):
                shown[name] = getattr(self, name)
        if self.clamp > 0:
            shown["clamp"] = self.clamp
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
