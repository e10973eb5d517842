"""Hugging Face transformers: Parakeet's transducers, trained without their logits.

Interface: transformers 5.23, ``ParakeetForRNNT`` and ``ParakeetForTDT``
(``models/parakeet/modeling_parakeet.py``) with their losses ``ParakeetForRNNTLoss`` and
``ParakeetForTDTLoss`` (``loss/loss_rnnt.py``, ``loss/loss_tdt.py``). The former's needs torchaudio,
here it does not.
"""

from __future__ import annotations

import functools
from typing import Any

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

from rnnt_op.functional import joint_rnnt_loss
from rnnt_op.integrations.activations import activation_name
from rnnt_op.integrations.method_override import class_before, override_methods
from rnnt_op.integrations.output_layer import check_known, owner, qualified_name, weight_and_bias
from rnnt_op.integrations.reductions import reduced
from rnnt_op.topologies import RNNT, tdt

__all__ = ["fuse_loss"]

_MODELS = tuple(qualified_name(kind) for kind in (ParakeetForRNNT, ParakeetForTDT))
_JOINTS = tuple(
    qualified_name(kind) for kind in (ParakeetRNNTJointNetwork, ParakeetTDTJointNetwork)
)


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
            joint_rnnt_loss,
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
