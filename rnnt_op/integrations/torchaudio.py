"""torchaudio's transducer loss.

Interface: torchaudio 2.11, ``torchaudio.functional.rnnt_loss`` and
``torchaudio.transforms.RNNTLoss``. Nothing here imports torchaudio.
"""

from __future__ import annotations

from torch import Tensor, nn

from rnnt_op.functional import rnnt_loss

__all__ = ["RNNTLoss", "rnnt_loss"]


class RNNTLoss(nn.Module):
    """:func:`rnnt_op.rnnt_loss` as a module.

    Args:
        blank, clamp, reduction, fused_log_softmax: as there.
    """

    def __init__(
        self,
        blank: int = -1,
        clamp: float = -1.0,
        reduction: str = "mean",
        fused_log_softmax: bool = True,
    ) -> None:
        super().__init__()
        self.blank = blank
        self.clamp = clamp
        self.reduction = reduction
        self.fused_log_softmax = fused_log_softmax

    def forward(
        self, logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Loss of a batch; arguments, result and errors as in :func:`rnnt_op.rnnt_loss`."""
        return rnnt_loss(
            logits,
            targets,
            logit_lengths,
            target_lengths,
            self.blank,
            self.clamp,
            self.reduction,
            self.fused_log_softmax,
        )
