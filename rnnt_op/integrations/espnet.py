"""ESPnet's transducer losses, and its joint network without logits.

Interface: ESPnet 202511, ``ESPnetASRModel`` (``espnet2/asr/espnet_model.py``), ``JointNetwork``
(``espnet2/asr_transducer/joint_network.py``) and ``MultiblankRNNTLossNumba``
(``espnet2/asr/transducer/rnnt_multi_blank``). Its regular loss is that of
:mod:`rnnt_op.integrations.warprnnt_pytorch`. Nothing here imports ESPnet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from rnnt_op.functional import joint_rnnt_loss, rnnt_loss
from rnnt_op.integrations.activations import activation_name
from rnnt_op.integrations.method_override import class_before, override_methods
from rnnt_op.integrations.output_layer import check_known, owner, qualified_name, weight_and_bias
from rnnt_op.topologies import RNNT, Topology, multi_blank

__all__ = ["MultiblankRNNTLoss", "fuse_loss"]

_MODEL = "espnet2.asr.espnet_model.ESPnetASRModel"
_JOINT = "espnet2.asr_transducer.joint_network.JointNetwork"


class MultiblankRNNTLoss(nn.Module):
    """ESPnet's ``MultiblankRNNTLossNumba``, for ``model.criterion_transducer``.

    Args:
        blank: index of the blank; the big blanks are the tokens before it, the first duration's
            next to it.
        big_blank_durations: frames that each reads.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` over the batch.
        fastemit_lambda: FastEmit's λ, in gradients alone: the loss is that of λ = 0.
        clamp: as in :func:`rnnt_op.rnnt_loss`.
        sigma: logit under-normalisation.
    """

    def __init__(
        self,
        blank: int,
        big_blank_durations: Sequence[int],
        reduction: str = "mean",
        fastemit_lambda: float = 0.0,
        clamp: float = -1.0,
        sigma: float = 0.0,
    ) -> None:
        super().__init__()
        self.blank = blank
        self.big_blank_durations = big_blank_durations
        self.reduction = reduction
        self.fastemit_lambda = fastemit_lambda
        self.clamp = clamp
        self.sigma = sigma

    def forward(self, acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            acts: logits. [B, T, U+1, V]
            labels: labels, int32 or int64. [B, U]
            act_lens: frames T of each sample. [B]
            label_lens: labels U of each sample. [B]

        Returns:
            The loss in nats. [B] or []

        Raises:
            TypeError, ValueError, RuntimeError: as in :func:`rnnt_op.rnnt_loss`.
        """
        return rnnt_loss(acts, labels, act_lens, label_lens, **_options(self))


def fuse_loss(model: Any) -> None:
    """Computes the loss of a model from its encoder and predictor states, without logits.

    Changes the model in place. Lattice and reduction are those of ``model.criterion_transducer``,
    error rates stay ESPnet's.

    Args:
        model: ``ESPnetASRModel`` with a joint network.

    Raises:
        ValueError: now or when the loss is computed: the loss does not know the joint network, its
            activation or its output layer (:mod:`rnnt_op.integrations.output_layer`), or the
            criterion's lattice, or the model computes its loss in a way of its own.
    """
    _joint_network(model)
    _options(model.criterion_transducer)
    override_methods(model, _LossWithoutLogits)


def _joint_network(model: Any) -> dict[str, Any]:
    """Arguments of the loss that are the joint network, which is not called."""
    kind = owner(class_before(model, _LossWithoutLogits), "_calc_transducer_loss")
    if kind != _MODEL:
        raise ValueError(
            f"model: expected the _calc_transducer_loss of {_MODEL}, got that of {kind}, which "
            "would not be called; leave the model as it is, or have ESPnet's there"
        )
    joint = model.joint_network
    check_known(joint, "model.joint_network", (_JOINT,))
    weight, bias = weight_and_bias(joint.lin_out, "model.joint_network.lin_out")
    name = "model.joint_network.joint_activation"
    return {
        "weight": weight,
        "bias": bias,
        "activation": activation_name(joint.joint_activation, name),
    }


class _LossWithoutLogits(nn.Module):
    """What replaces methods of ``ESPnetASRModel``."""

    ignore_id: int
    blank_id: int
    decoder: Any
    joint_network: Any
    criterion_transducer: nn.Module
    error_calculator_trans: Any

    def _calc_transducer_loss(
        self, encoder_out: Tensor, encoder_out_lens: Tensor, labels: Tensor
    ) -> tuple[Tensor, float | None, float | None]:
        """Loss, character and word error rate; encoder_out [B, T, D], labels [B, U]."""
        is_label = labels != self.ignore_id
        targets = labels.where(is_label, self.blank_id)
        self.decoder.set_device(encoder_out.device)
        decoder_out = self.decoder(F.pad(targets, (1, 0), value=self.blank_id))
        joint = self.joint_network
        loss = joint_rnnt_loss(
            # Of the shapes that the joint network has there, for what else it does with them.
            joint.lin_enc(encoder_out.unsqueeze(2)).squeeze(2),
            joint.lin_dec(decoder_out.unsqueeze(1)).squeeze(1),
            targets=targets,
            encoder_lengths=encoder_out_lens,
            target_lengths=is_label.sum(1),
            **_joint_network(self),
            **_options(self.criterion_transducer),
        )
        if self.training or self.error_calculator_trans is None:
            return loss, None, None
        return loss, *self.error_calculator_trans(encoder_out, targets)


def _options(criterion: Any) -> dict[str, Any]:
    """The arguments of the losses here that a criterion of ESPnet stands for."""
    names = ("RNNTLoss", "MultiblankRNNTLoss", "MultiblankRNNTLossNumba")
    if type(criterion).__name__ not in names:
        raise ValueError(
            f"model.criterion_transducer: expected one of {', '.join(names)}, got "
            f"{type(criterion).__name__}"
        )
    check_known(criterion, "model.criterion_transducer", (qualified_name(type(criterion)),))
    return {
        "blank": criterion.blank,
        "topology": _topology(criterion),
        "fast_emit": getattr(criterion, "fastemit_lambda", 0.0),
        "clamp": getattr(criterion, "clamp", -1.0),
        "reduction": criterion.reduction,
    }


def _topology(criterion: Any) -> Topology:
    durations = getattr(criterion, "big_blank_durations", ())
    if not durations:
        return RNNT
    columns = [criterion.blank - 1 - i for i in range(len(durations))]
    return multi_blank(durations, columns=columns, sigma=criterion.sigma)
