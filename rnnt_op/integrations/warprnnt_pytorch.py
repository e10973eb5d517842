"""warp-transducer's loss, which ESPnet and NeMo import by this module's name.

Interface: ``warprnnt_pytorch`` of HawkAaron/warp-transducer, and ``fastemit_lambda`` of the fork
that ESPnet installs. ``sys.modules["warprnnt_pytorch"] = rnnt_op.integrations.warprnnt_pytorch``
serves both where it is not installed.

Here a reduced loss has shape [], theirs [1].
"""

from __future__ import annotations

from torch import Tensor, nn

from rnnt_op import functional

__all__ = ["RNNTLoss", "rnnt_loss"]


def rnnt_loss(
    acts: Tensor,
    labels: Tensor,
    act_lens: Tensor,
    label_lens: Tensor,
    blank: int = 0,
    reduction: str = "mean",
    fastemit_lambda: float = 0.0,
) -> Tensor:
    """Transducer loss of logits.

    Args:
        acts: logits. [B, T, U+1, V]
        labels: labels, int32 or int64. [B, U]
        act_lens: frames T of each sample. [B]
        label_lens: labels U of each sample. [B]
        blank: index of the blank token.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` over the batch.
        fastemit_lambda: FastEmit's λ, in gradients alone: the loss is that of λ = 0.

    Returns:
        The loss in nats. [B] or []

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`rnnt_op.rnnt_loss`.
    """
    return functional.rnnt_loss(
        acts,
        labels,
        act_lens,
        label_lens,
        blank=blank,
        reduction=reduction,
        fast_emit=fastemit_lambda,
    )


class RNNTLoss(nn.Module):
    """:func:`rnnt_loss` as a module.

    Args:
        blank, reduction, fastemit_lambda: as there.
    """

    def __init__(
        self, blank: int = 0, reduction: str = "mean", fastemit_lambda: float = 0.0
    ) -> None:
        super().__init__()
        self.blank = blank
        self.reduction = reduction
        self.fastemit_lambda = fastemit_lambda

    def forward(self, acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> Tensor:
        """Loss of a batch; arguments and result as in :func:`rnnt_loss`."""
        return rnnt_loss(
            acts,
            labels,
            act_lens,
            label_lens,
            self.blank,
            self.reduction,
            self.fastemit_lambda,
        )
