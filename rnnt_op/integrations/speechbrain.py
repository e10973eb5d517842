"""SpeechBrain's transducer loss, and its joint network without logits.

Interface: ``speechbrain.nnet.losses.transducer_loss`` of SpeechBrain 1.0.3, the last with
``use_torchaudio``, and ``speechbrain.nnet.transducer.transducer_joint.Transducer_joint``. Nothing
here imports SpeechBrain. Lengths are shares of the longest utterance, in (0, 1].

``use_torchaudio`` has no default here. Where SpeechBrain has it no more, from 1.0.4, its loss is
the Numba one, which divides each sample's loss by its T, and its gradient by neither T nor B; True
says that the loss may change to torchaudio's, the mean of undivided losses.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rnnt_op.functional import joint_rnnt_loss, rnnt_loss
from rnnt_op.integrations.activations import activation_name
from rnnt_op.integrations.output_layer import check_known, weight_and_bias

__all__ = ["joint_transducer_loss", "transducer_loss"]

_JOINT = "speechbrain.nnet.transducer.transducer_joint.Transducer_joint"


def transducer_loss(
    logits: Tensor,
    targets: Tensor,
    input_lens: Tensor,
    target_lens: Tensor,
    blank_index: int,
    reduction: str = "mean",
    *,
    use_torchaudio: bool,
) -> Tensor:
    """Transducer loss of logits, or of log-probabilities, which a softmax leaves as they are.

    Args:
        logits: [B, T, U+1, V]
        targets: labels without blanks, int32 or int64. [B, U]
        input_lens: frames of each sample, as shares of T. [B]
        target_lens: labels of each sample, as shares of U. [B]
        blank_index: index of the blank token.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` over the batch.
        use_torchaudio: True, torchaudio's loss. SpeechBrain's Numba loss, its only one from 1.0.4,
            is refused: no loss has its gradient.

    Returns:
        The loss in nats. [B] or []

    Raises:
        TypeError, RuntimeError: as in :func:`rnnt_op.rnnt_loss`.
        ValueError: as there, or use_torchaudio is False.
    """
    _check_torchaudio(use_torchaudio)
    return rnnt_loss(
        logits,
        targets,
        _counts(input_lens, logits.shape[1]),
        _counts(target_lens, targets.shape[1]),
        blank=blank_index,
        reduction=reduction,
    )


def joint_transducer_loss(
    joint: Any,
    output_layer: Any,
    encoder: Tensor,
    predictor: Tensor,
    targets: Tensor,
    input_lens: Tensor,
    target_lens: Tensor,
    blank_index: int,
    reduction: str = "mean",
    *,
    use_torchaudio: bool,
) -> Tensor:
    """Transducer loss of a ``Transducer_joint`` and the linear layer behind it, without logits.

    Replaces ``transducer_loss(output_layer(joint(encoder.unsqueeze(2), predictor.unsqueeze(1))),
    ...)``.

    Args:
        joint: ``Transducer_joint(joint="sum", nonlinearity=...)``.
        output_layer: ``speechbrain.nnet.linear.Linear``, ``torch.nn.Linear``, or peft's LoRA on it.
        encoder: encoder states. [B, T, H]
        predictor: predictor states. [B, U+1, H]
        targets, input_lens, target_lens, blank_index, reduction, use_torchaudio: as in
            :func:`transducer_loss`.

    Returns:
        The loss in nats. [B] or []

    Raises:
        TypeError, RuntimeError: as in :func:`rnnt_op.joint_rnnt_loss`.
        ValueError: as there, or the joint network does not add up the states, or the loss does not
            know its nonlinearity or the output layer (:mod:`rnnt_op.integrations.output_layer`).
    """
    _check_torchaudio(use_torchaudio)
    check_known(joint, "joint", (_JOINT,))
    if joint.joint != "sum":
        raise ValueError(
            f"joint: expected 'sum', got {joint.joint!r}; build Transducer_joint(joint='sum'), or "
            "give transducer_loss its logits"
        )
    return joint_rnnt_loss(
        encoder,
        predictor,
        *weight_and_bias(output_layer, "output_layer"),
        targets,
        _counts(input_lens, encoder.shape[1]),
        _counts(target_lens, targets.shape[1]),
        blank=blank_index,
        activation=activation_name(joint.nonlinearity, "joint.nonlinearity"),
        reduction=reduction,
    )


def _check_torchaudio(use_torchaudio: bool) -> None:
    if not use_torchaudio:
        raise ValueError(
            "use_torchaudio: expected True, got False: the loss of SpeechBrain's Numba code is "
            "divided by T, its gradient is not; for a loss per frame divide that of reduction="
            "'none' by the frames"
        )


def _counts(shares: Tensor, longest: int) -> Tensor:
    return (shares * longest).round().int()
