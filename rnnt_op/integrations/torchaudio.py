"""torchaudio's transducer loss.

Interface: torchaudio 2.11, ``torchaudio.functional.rnnt_loss`` and
``torchaudio.transforms.RNNTLoss``. Nothing here imports torchaudio.
"""

# Without postponed annotations, which TorchScript cannot read of what it does not compile.

import torch
from torch import Tensor, nn

from rnnt_op import functional

__all__ = ["RNNTLoss", "rnnt_loss"]


# TorchScript calls it in Python, since it can compile no more of it than the signature.
@torch.jit.ignore  # type: ignore[untyped-decorator]
def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = -1,
    clamp: float = -1.0,
    reduction: str = "mean",
    fused_log_softmax: bool = True,
) -> Tensor:
    """:func:`rnnt_op.rnnt_loss` with torchaudio's arguments alone.

    Args:
        logits, targets, logit_lengths, target_lengths, blank, clamp, reduction, fused_log_softmax:
            as there.

    Returns:
        The loss in nats, float16 for float16 logits, as torchaudio's, though computed in float32;
        else of the dtype that :func:`rnnt_op.rnnt_loss` has. [B] or []

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`rnnt_op.rnnt_loss`.
    """
    loss = functional.rnnt_loss(
        logits,
        targets,
        logit_lengths,
        target_lengths,
        blank,
        clamp,
        reduction,
        fused_log_softmax,
    )
    return loss.half() if logits.dtype == torch.float16 else loss


class RNNTLoss(nn.Module):
    """:func:`rnnt_loss` as a module. ``torch.jit.script`` takes it, ``torch.jit.save`` does not.

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
        self.clamp = float(clamp)  # TorchScript makes no float of an int
        self.reduction = reduction
        self.fused_log_softmax = fused_log_softmax

    def forward(
        self, logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Loss of a batch; arguments, result and errors as in :func:`rnnt_loss`."""
        loss: Tensor = rnnt_loss(
            logits,
            targets,
            logit_lengths,
            target_lengths,
            self.blank,
            self.clamp,
            self.reduction,
            self.fused_log_softmax,
        )
        return loss
