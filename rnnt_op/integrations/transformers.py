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
from transformers.models.parakeet.modeling_parakeet import (
    ParakeetForRNNT,
    ParakeetForTDT,
    ParakeetRNNTOutput,
)
from transformers.utils.generic import can_return_tuple

from rnnt_op.functional import joint_rnnt_loss
from rnnt_op.integrations.activations import activation_name
from rnnt_op.integrations.method_override import override_methods
from rnnt_op.integrations.reductions import reduced
from rnnt_op.topologies import RNNT, tdt

__all__ = ["fuse_loss"]


def fuse_loss(model: nn.Module) -> None:
    """Computes the loss of a model from its encoder and predictor states, without logits.

    Changes the model in place: called with ``labels``, its output has the loss that it had, and no
    logits. ``reduction`` and ``sigma`` are taken from the call, as before: ``"mean_volume"`` for
    ``ParakeetForRNNT``, ``"mean"`` and 0 for ``ParakeetForTDT``. Everything else, generation among
    it, stays as it is.

    Args:
        model: ``ParakeetForRNNT`` or ``ParakeetForTDT``.

    Raises:
        TypeError: the model is none of these.
        ValueError: the loss does not know the joint network's activation, or the model has been
            given a loss function of its own.
    """
    if not isinstance(model, ParakeetForRNNT):
        raise TypeError(
            f"model: expected ParakeetForRNNT or ParakeetForTDT, got {type(model).__name__}"
        )
    activation_name(model.joint.activation)
    if hasattr(model, "_loss_function"):
        raise ValueError(
            "model: expected the loss function of its class, got one that was set; delete "
            "model._loss_function"
        )
    override_methods(model, _LossWithoutLogits)


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
            self.decoder(decoder_input_ids),
            self.joint.head.weight,
            self.joint.head.bias,
            labels,
            encoder_outputs.attention_mask.sum(-1),
            label_lengths,
            blank=self.config.blank_token_id,
            topology=topology,
            activation=activation_name(self.joint.activation),
        )
        return ParakeetRNNTOutput(
            loss=reduced(loss, label_lengths, kwargs.get("reduction", reduction)),
            last_hidden_state=encoder_outputs.last_hidden_state,
            pooler_output=encoder_outputs.pooler_output,
            hidden_states=encoder_outputs.hidden_states,
            attentions=encoder_outputs.attentions,
        )
