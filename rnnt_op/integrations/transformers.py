"""Hugging Face transformers: its transducer losses, and Parakeet's models without their logits.

Interface: transformers 5.23, ``rnnt_loss`` and ``tdt_loss`` (``loss/loss_rnnt.py``,
``loss/loss_tdt.py``), and ``ParakeetForRNNT`` and ``ParakeetForTDT``
(``models/parakeet/modeling_parakeet.py``), which call them. The first needs torchaudio, here it
does not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_rnnt import ParakeetForRNNTLoss
from transformers.loss.loss_tdt import ParakeetForTDTLoss
from transformers.models.parakeet.modeling_parakeet import (
    ParakeetForRNNT,
    ParakeetForTDT,
    ParakeetRNNTJointNetwork,
    ParakeetRNNTOutput,
    ParakeetTDTJointNetwork,
)
from transformers.utils.generic import can_return_tuple

from rnnt_op import functional
from rnnt_op.integrations.activations import activation_name
from rnnt_op.integrations.method_override import class_before, override_methods
from rnnt_op.integrations.output_layer import check_known, owner, qualified_name, weight_and_bias
from rnnt_op.integrations.reductions import reduced
from rnnt_op.topologies import RNNT, tdt

__all__ = ["fuse_loss", "rnnt_loss", "tdt_loss"]

_MODELS = tuple(qualified_name(kind) for kind in (ParakeetForRNNT, ParakeetForTDT))
_JOINTS = tuple(
    qualified_name(kind) for kind in (ParakeetRNNTJointNetwork, ParakeetTDTJointNetwork)
)


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank_token_id: int,
    reduction: str = "mean_volume",
) -> Tensor:
    """Transducer loss of logits.

    Args:
        logits: [B, T, U+1, V]
        targets: labels of any integer dtype; padding may hold anything. [B, U]
        logit_lengths: frames T of each sample. [B]
        target_lengths: labels U of each sample. [B]
        blank_token_id: index of the blank.
        reduction: ``"mean_volume"``, ``"mean_batch"``, ``"mean"``, ``"sum"`` or ``"none"``
            (:func:`rnnt_op.integrations.reductions.reduced`).

    Returns:
        The loss in nats, float32 (float64 for float64 logits, which transformers rounds). [B] or []

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`rnnt_op.rnnt_loss`.
    """
    on_device = _integers(logits, targets, logit_lengths, target_lengths)
    loss = functools.partial(functional.rnnt_loss, logits, *on_device, blank=blank_token_id)
    return reduced(loss, target_lengths, reduction)


def tdt_loss(
    token_logits: Tensor,
    duration_logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank_token_id: int,
    durations: Sequence[int],
    sigma: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Token-and-duration transducer loss of logits, which are copied side by side.

    Args:
        token_logits: blank included. [B, T, U+1, V]
        duration_logits: one column for each duration. [B, T, U+1, D]
        targets, logit_lengths, target_lengths, blank_token_id, reduction: as in
            :func:`rnnt_loss`.
        durations: frames that a symbol may read, as in :func:`rnnt_op.topologies.tdt`.
        sigma: logit under-normalisation: taken from every token's log-probability.

    Returns:
        The loss in nats, of the dtype that :func:`rnnt_loss` has. [B] or []

    Raises:
        TypeError, RuntimeError: as in :func:`rnnt_op.rnnt_loss`.
        ValueError: as there, or the logits are not of these durations or not of the same nodes.
    """
    expected = (*token_logits.shape[:-1], len(durations))
    if duration_logits.shape != expected:
        raise ValueError(
            f"duration_logits: expected shape {tuple(expected)}, that of token_logits with a "
            f"column for each of durations, got {tuple(duration_logits.shape)}"
        )
    loss = functools.partial(
        functional.rnnt_loss,
        torch.cat([token_logits, duration_logits], -1),
        *_integers(token_logits, targets, logit_lengths, target_lengths),
        blank=blank_token_id,
        topology=tdt(durations, sigma=sigma),
    )
    return reduced(loss, target_lengths, reduction)


def _integers(
    logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op wants them, where transformers casts and moves what it is given."""
    return targets.to(logits.device).long(), logit_lengths.long(), target_lengths.long()


def fuse_loss(model: nn.Module) -> None:
    """Computes the loss of a model from its encoder and predictor states, without logits.

    Changes the model in place: called with ``labels``, its output has the loss that it had, and no
    logits. ``reduction`` and ``sigma`` are taken from the call, as before: ``"mean_volume"`` for
    ``ParakeetForRNNT``, ``"mean"`` and 0 for ``ParakeetForTDT``. Everything else, generation among
    it, stays as it is.

    Args:
        model: ``ParakeetForRNNT`` or ``ParakeetForTDT``, before or after
            ``peft.get_peft_model``.

    Raises:
        TypeError: the model is none of these.
        ValueError: now or when the loss is computed: the loss does not know the joint network's
            activation or output layer (:mod:`rnnt_op.integrations.output_layer`), or the model has
            been given a loss function or a forward of its own.
    """
    if not isinstance(model, ParakeetForRNNT):
        raise TypeError(
            f"model: expected ParakeetForRNNT or ParakeetForTDT, got {type(model).__name__}; of "
            "what wraps one, give the model inside"
        )
    _joint_network(model)
    override_methods(model, _LossWithoutLogits)


def _joint_network(model: Any) -> dict[str, Any]:
    """Arguments of the loss that are the joint network, which is not called."""
    kind = owner(class_before(model, _LossWithoutLogits), "forward")
    if kind not in _MODELS:
        raise ValueError(
            f"model: expected the forward of {' or '.join(_MODELS)}, got that of {kind}, which "
            "would not be called; take the class of transformers, or leave the model as it is"
        )
    is_tdt = isinstance(model, ParakeetForTDT)
    if model.loss_function is not (ParakeetForTDTLoss if is_tdt else ParakeetForRNNTLoss):
        raise ValueError(
            "model: expected the loss function of its class, got one that was set; delete "
            "model._loss_function"
        )
    check_known(model.joint, "model.joint", _JOINTS)
    weight, bias = weight_and_bias(model.joint.head, "model.joint.head")
    activation = activation_name(model.joint.activation, "model.joint.activation")
    return {"weight": weight, "bias": bias, "activation": activation}


class _LossWithoutLogits(nn.Module):
    """What replaces methods of ``ParakeetForRNNT`` and ``ParakeetForTDT``."""

    config: Any
    joint: Any
    decoder: nn.Module
    get_audio_features: Any

    # Named as in the model's own, since Trainer keeps the columns that forward names.
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_cache: Any = None,
        use_decoder_cache: bool | None = None,
        encoder_outputs: Any = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return super().forward(
                input_features=input_features,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_cache=decoder_cache,
                use_decoder_cache=use_decoder_cache,
                encoder_outputs=encoder_outputs,
                **kwargs,
            )
        if decoder_cache is not None or use_decoder_cache:
            raise ValueError("decoder_cache: expected none with labels; it is for generation")
        if encoder_outputs is None:
            encoder_outputs = self.get_audio_features(
                input_features=input_features, attention_mask=attention_mask, **kwargs
            )
        if isinstance(self, ParakeetForTDT):
            topology = tdt(self.config.durations, sigma=kwargs.get("sigma", 0.0))
            padding, reduction = self.config.pad_token_id, "mean"
        else:
            topology, padding, reduction = RNNT, self.config.blank_token_id, "mean_volume"
        label_lengths = (labels != padding).sum(-1)
        loss = functools.partial(
            functional.joint_rnnt_loss,
            encoder_outputs.pooler_output,
            self.decoder(decoder_input_ids, cache=None),
            targets=labels,
            encoder_lengths=encoder_outputs.attention_mask.sum(-1),
            target_lengths=label_lengths,
            blank=self.config.blank_token_id,
            topology=topology,
            **_joint_network(self),
        )
        return ParakeetRNNTOutput(
            loss=reduced(loss, label_lengths, kwargs.get("reduction", reduction)),
            last_hidden_state=encoder_outputs.last_hidden_state,
            pooler_output=encoder_outputs.pooler_output,
            hidden_states=encoder_outputs.hidden_states,
            attentions=encoder_outputs.attentions,
        )
