"""warp-transducer's loss, which ESPnet and NeMo import by this module's name.

Interface: ``warprnnt_pytorch`` of HawkAaron/warp-transducer, and ``fastemit_lambda`` of the fork
that ESPnet installs. ``sys.modules["warprnnt_pytorch"] = rnnt_op.integrations.warprnnt_pytorch``
serves both where it is not installed. A reduced loss has shape [1], as theirs.
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
        The loss in nats. [B] or [1]

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`rnnt_op.rnnt_loss`.
    """
    loss = functional.rnnt_loss(
        acts,
        labels,
        act_lens,
        label_lens,
        blank=blank,
        reduction=reduction,
        fast_emit=fastemit_lambda,
    )
    return loss if reduction == "none" else loss.unsqueeze(0)


class RNNTLoss(nn.Module):
    """:func:`rnnt_loss` as a module.

    Args:
        blank, reduction, fastemit_lambda: as there.
        size_average: of the first versions: True for ``reduction="mean"``, False, which was their
            default, for ``"sum"``.
        blank_label: what they called ``blank``.

    Raises:
        ValueError: an argument is given by both of its names, or ``size_average`` without its name.
    """

    def __init__(
        self,
        blank: int = 0,
        reduction: str = "mean",
        fastemit_lambda: float = 0.0,
        *,
        size_average: bool | None = None,
        blank_label: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(blank, bool):
            raise ValueError(
                f"blank: expected an index, got {blank}; name what the first versions had in its "
                f"place, size_average={blank}, and blank_label"
            )
        if size_average is not None:
            if reduction != "mean":
                raise ValueError(f"size_average: expected None beside reduction={reduction!r}")
            reduction = "mean" if size_average else "sum"
        if blank_label is not None:
            if blank != 0:
                raise ValueError(f"blank_label: expected None beside blank={blank}")
            blank = blank_label
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
