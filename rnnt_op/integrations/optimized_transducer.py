"""optimized_transducer's loss, of logits packed without padding.

Interface: ``optimized_transducer`` 1.4 (863667a), whose names, arguments and defaults these are.
Nothing here imports it. Theirs puts the gradient into the logits' memory; here the packed logits
are copied into a padded tensor. :func:`rnnt_op.joint_rnnt_loss` needs neither.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnt_op import functional
from rnnt_op.integrations.packed_rows import unpacked
from rnnt_op.topologies import modified
from rnnt_op.validation import check_choice

__all__ = ["TransducerLoss", "transducer_loss"]


def transducer_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    from_log_softmax: bool,
    one_sym_per_frame: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Transducer loss of packed logits.

    Args:
        logits: those of the first sample first, in it those of the first frame.
            [Σ T (U+1), V]
        targets: labels, int32 or int64; padding may hold anything. [B, U]
        logit_lengths: frames T of each sample; read on the CPU. [B]
        target_lengths: labels U of each sample; read on the CPU. [B]
        blank: index of the blank.
        from_log_softmax: the logits are log-probabilities, which are not normalised again.
        one_sym_per_frame: a label reads a frame, and the last frame has a blank: the lattice
            ``topologies.modified()`` of all frames but the last, with a closing blank.
        reduction: ``"sum"``, or ``"mean"`` over the batch.

    Returns:
        The loss in nats. []

    Raises:
        TypeError, RuntimeError: as in :func:`rnnt_op.rnnt_loss`.
        ValueError: as there, or the logits are not as many as the lengths say, or the reduction is
            another.
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    padded = unpacked(logits, logit_lengths, target_lengths, targets.shape[1], "logits")
    if not one_sym_per_frame:
        return functional.rnnt_loss(
            padded,
            targets,
            logit_lengths,
            target_lengths,
            blank=blank,
            reduction=reduction,
            fused_log_softmax=not from_log_softmax,
        )
    log_probs = padded if from_log_softmax else padded.log_softmax(3)
    frames = torch.arange(padded.shape[1], device=padded.device)
    is_last = frames == logit_lengths.to(padded.device).unsqueeze(1) - 1
    is_label = torch.arange(padded.shape[3], device=padded.device) != blank % padded.shape[3]
    return functional.rnnt_loss(
        log_probs.masked_fill(is_last[:, :, None, None] & is_label, -torch.inf),
        targets,
        logit_lengths,
        target_lengths,
        blank=blank,
        topology=modified(),
        reduction=reduction,
        fused_log_softmax=False,
    )


class TransducerLoss(nn.Module):
    """:func:`transducer_loss` as a module.

    Args:
        blank, reduction: as there.
    """

    def __init__(self, blank: int, reduction: str = "mean") -> None:
        super().__init__()
        self.blank = blank
        self.reduction = reduction

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        logit_lengths: Tensor,
        target_lengths: Tensor,
        from_log_softmax: bool,
        one_sym_per_frame: bool = False,
    ) -> Tensor:
        """Loss of a batch; arguments and result as in :func:`transducer_loss`."""
        return transducer_loss(
            logits,
            targets,
            logit_lengths,
            target_lengths,
            self.blank,
            from_log_softmax,
            one_sym_per_frame,
            self.reduction,
        )
