"""NeMo's transducer losses, and its joint network without logits.

Interface: nemo-toolkit 3.0.0, ``RNNTLoss`` (``nemo/collections/asr/losses/rnnt.py``) and
``RNNTJoint`` with ``fuse_loss_wer`` (``modules/rnnt.py``). Nothing here imports NeMo.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rnnt_op.functional import joint_rnnt_loss, rnnt_loss
from rnnt_op.integrations.method_override import class_before, override_methods
from rnnt_op.integrations.nemo_joint import joint_network
from rnnt_op.integrations.output_layer import check_known, qualified_name
from rnnt_op.integrations.reductions import REDUCTIONS, reduced, with_fast_emit_cost
from rnnt_op.topologies import RNNT, Topology, multi_blank, tdt
from rnnt_op.torch_private import hooks_behind_forward
from rnnt_op.validation import check_choice

__all__ = ["RNNTLoss", "fuse_loss"]

# More than any batch has, so that NeMo computes the error rate of a batch at once.
_WHOLE_BATCH = 2**31 - 1

_REGULAR = ("default", "warprnnt_numba", "warprnnt", "pytorch")
_MULTI_BLANK = ("multiblank_rnnt", "multiblank_rnnt_pytorch")
_TDT = ("tdt", "tdt_pytorch")

# What NeMo resolves a loss_name to, so that a loss can be read off a model.
_LOSS_NAMES = {
    "RNNTLossNumba": "warprnnt_numba",
    "RNNTLoss": "warprnnt",
    "RNNTLossPytorch": "pytorch",
    "MultiblankRNNTLossNumba": "multiblank_rnnt",
    "MultiblankRNNTLossPytorch": "multiblank_rnnt_pytorch",
    "TDTLossNumba": "tdt",
    "TDTLossPytorch": "tdt_pytorch",
}


class RNNTLoss(nn.Module):
    """NeMo's ``RNNTLoss``, of given logits: ``model.loss = RNNTLoss(...)``.

    Args:
        num_classes: index of the blank: V without it, big blanks included, durations not.
        reduction: ``"mean_batch"``, ``"mean_volume"``, ``"mean"``, ``"sum"`` or None, as NeMo has
            them (:func:`rnnt_op.integrations.reductions.reduced`).
        loss_name: ``"default"``, ``"warprnnt_numba"``, ``"warprnnt"`` and ``"pytorch"`` are the
            regular transducer; ``"multiblank_rnnt"`` and ``"tdt"`` what they say, with or without
            ``"_pytorch"``.
        loss_kwargs: ``fastemit_lambda`` and ``clamp``; for multi-blank ``big_blank_durations`` and
            ``sigma``; for TDT ``durations``, ``sigma`` and ``omega``, the probability with which a
            call takes the regular loss of the tokens instead.
        fastemit_cost: with ``fastemit_lambda`` λ, report (1 + λ) times the loss, as NeMo's Numba
            code does, instead of the loss of λ = 0; gradients are the same.

    Raises:
        ValueError: the loss is none of these, or TDT is to have FastEmit or a clamp, which NeMo
            applies to the gradient of the tokens alone.
    """

    def __init__(
        self,
        num_classes: int,
        reduction: str | None = "mean_batch",
        loss_name: str = "default",
        loss_kwargs: Mapping[str, Any] | None = None,
        *,
        fastemit_cost: bool = False,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction or "none", REDUCTIONS)
        check_choice("loss_name", loss_name, (*_REGULAR, *_MULTI_BLANK, *_TDT))
        kwargs = dict(loss_kwargs or {})
        self.blank = num_classes
        self.reduction = reduction
        self.fast_emit = kwargs.pop("fastemit_lambda", 0.0)
        self.reported_fast_emit = self.fast_emit if fastemit_cost else 0.0
        self.clamp = kwargs.pop("clamp", -1.0)
        self.omega = 0.0
        self.topology = RNNT
        if loss_name in _MULTI_BLANK:
            big_blanks = kwargs.pop("big_blank_durations", ())
            self.topology = multi_blank(big_blanks, sigma=kwargs.pop("sigma", 0.0))
        elif loss_name in _TDT:
            self.omega = kwargs.pop("omega", 0.0)
            self.topology = tdt(kwargs.pop("durations", ()), sigma=kwargs.pop("sigma", 0.0))
            if self.fast_emit or self.clamp > 0:
                raise ValueError(
                    "loss_kwargs: expected neither fastemit_lambda nor clamp with tdt, where NeMo "
                    "applies them to the gradient of the tokens and not to that of the durations; "
                    "rnnt_op.rnnt_loss applies them to both"
                )
        if kwargs:
            raise ValueError(f"loss_kwargs: {loss_name} has no {', '.join(kwargs)}; remove it")

    def forward(
        self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Loss of a batch.

        Args:
            log_probs: logits, or their log-probabilities: a softmax leaves them as they are; with
                TDT the durations' columns come last. [B, T, U+1, V]
            targets: labels; may be longer than U. [B, ≥ U]
            input_lengths: frames T of each sample. [B]
            target_lengths: labels U of each sample. [B]

        Returns:
            The loss in nats. [B] or []

        Raises:
            TypeError, ValueError, RuntimeError: as in :func:`rnnt_op.rnnt_loss`.
        """
        topology, columns = self.drawn_lattice(log_probs.shape[3])
        loss = functools.partial(
            rnnt_loss,
            log_probs[..., :columns],
            targets[:, : log_probs.shape[2] - 1],
            input_lengths,
            target_lengths,
            blank=self.blank,
            clamp=self.clamp,
            topology=topology,
            fast_emit=self.fast_emit,
        )
        return self.cost(loss, target_lengths)

    def cost(self, loss: Callable[..., Tensor], target_lengths: Tensor) -> Tensor:
        """The reduced loss, as it is to be reported."""
        value = reduced(loss, target_lengths, self.reduction or "none")
        return with_fast_emit_cost(value, self.reported_fast_emit)

    def drawn_lattice(self, columns: int) -> tuple[Topology, int]:
        """The topology of a call, and how many of the logits' columns it takes."""
        if self.omega and random.random() < self.omega:
            return RNNT, self.topology.tokens(columns)
        return self.topology, columns

    def reduce(self, losses: Tensor | Sequence[Tensor], target_lengths: Any) -> Tensor:
        """Reduces losses of ``reduction=None``, as NeMo's fused joint network asks it to."""
        if not isinstance(losses, Tensor):
            losses, target_lengths = torch.cat(list(losses)), torch.cat(list(target_lengths))
        name = self.reduction or "none"
        reductions = {"none": losses, "mean": losses.mean(), "sum": losses.sum()}
        return reduced(lambda reduction: reductions[reduction], target_lengths, name)


def fuse_loss(model: Any, *, fastemit_cost: bool = False) -> None:
    """Computes the loss of a model from its encoder and predictor states, without logits.

    Changes the model in place. Its joint network is called as with ``fuse_loss_wer``, which is
    switched on; the loss of the whole batch is one op, and what ``fused_batch_size`` divides is
    NeMo's word error rate alone. Lattice and reduction are those of ``model.loss``.

    Args:
        model: ``EncDecRNNTModel`` or another with ``joint``, an ``RNNTJoint``, ``loss`` and
            ``wer``.
        fastemit_cost: as in :class:`RNNTLoss`, where ``model.loss`` is NeMo's.

    Raises:
        ValueError: now or when the loss is computed: the loss is none that :class:`RNNTLoss`
            knows, or the joint network is not the sum, activation, dropout and output layer
            (:mod:`rnnt_op.integrations.output_layer`) that the loss computes.
    """
    joint = model.joint
    joint_network(joint, class_before(joint, _LossWithoutLogits))
    if hooks_behind_forward(joint) and not joint.fuse_loss_wer:
        raise ValueError(
            "model.joint: expected no hook that gets its logits, since it will return its loss; "
            "remove it, or keep its logits and set model.loss = RNNTLoss(...)"
        )
    loss = model.loss
    if not isinstance(loss, RNNTLoss):
        loss = _equal_loss(loss, fastemit_cost)
    elif fastemit_cost:
        raise ValueError(
            "fastemit_cost: expected False where model.loss is of rnnt_op; give it to that loss"
        )
    _check_loss(loss)
    joint.set_fuse_loss_wer(True, loss, model.wer)
    if joint.fused_batch_size is None:
        joint.set_fused_batch_size(_WHOLE_BATCH)
    override_methods(joint, _LossWithoutLogits)


def _equal_loss(loss: Any, fastemit_cost: bool) -> RNNTLoss:
    """The loss that a NeMo ``RNNTLoss`` has resolved its arguments to."""
    check_known(loss, "model.loss", ("nemo.collections.asr.losses.rnnt.RNNTLoss",))
    resolved = loss._loss
    kind = type(resolved).__name__
    if kind not in _LOSS_NAMES:
        known = ", ".join(_LOSS_NAMES)
        raise ValueError(f"model.loss: expected one of {known}, got {kind}")
    check_known(resolved, "model.loss._loss", (qualified_name(type(resolved)),))
    names = ("fastemit_lambda", "clamp", "big_blank_durations", "durations", "sigma", "omega")
    kwargs = {name: getattr(resolved, name) for name in names if hasattr(resolved, name)}
    cost = fastemit_cost or getattr(resolved, "fastemit_cost", False)
    name = _LOSS_NAMES[kind]
    return RNNTLoss(resolved.blank, loss.reduction, name, kwargs, fastemit_cost=cost)


def _check_loss(loss: Any) -> None:
    if type(loss) is not RNNTLoss:
        raise ValueError(
            f"model.joint.loss: expected the one that fuse_loss() set, got {type(loss).__name__}; "
            "set model.loss and call fuse_loss(model) again"
        )
    check_known(loss, "model.loss", (qualified_name(RNNTLoss),))


class _LossWithoutLogits(nn.Module):
    """What replaces methods of ``RNNTJoint``."""

    project_encoder: Any
    project_prednet: Any
    loss: RNNTLoss
    fuse_loss_wer: bool

    def forward(
        self,
        encoder_outputs: Tensor,
        decoder_outputs: Tensor | None,
        encoder_lengths: Tensor | None = None,
        transcripts: Tensor | None = None,
        transcript_lengths: Tensor | None = None,
        compute_wer: bool = False,
        keep_hypotheses: bool = False,
    ) -> Any:
        """As ``RNNTJoint.forward``: encoder_outputs [B, D, T], decoder_outputs [B, D', U+1]."""
        given = {
            "encoder_outputs": encoder_outputs,
            "encoder_lengths": encoder_lengths,
            "transcripts": transcripts,
            "transcript_lengths": transcript_lengths,
            "compute_wer": compute_wer,
            "keep_hypotheses": keep_hypotheses,
        }
        if not self.fuse_loss_wer or decoder_outputs is None:
            return super().forward(decoder_outputs=decoder_outputs, **given)
        if encoder_lengths is None or transcripts is None or transcript_lengths is None:
            raise ValueError(
                "encoder_lengths, transcripts, transcript_lengths: expected tensors, got None"
            )
        loss = self._joint_loss(
            encoder_outputs, decoder_outputs, encoder_lengths, transcripts, transcript_lengths
        )
        if not compute_wer:
            return loss, None, None, None
        _, *wer = super().forward(decoder_outputs=None, **given)
        return loss, *wer

    def _joint_loss(
        self,
        encoder_outputs: Tensor,
        decoder_outputs: Tensor,
        encoder_lengths: Tensor,
        transcripts: Tensor,
        transcript_lengths: Tensor,
    ) -> Tensor:
        _check_loss(self.loss)
        network = joint_network(self, class_before(self, _LossWithoutLogits))
        weight, bias = network.pop("weight"), network.pop("bias")
        topology, columns = self.loss.drawn_lattice(weight.shape[0])
        loss = functools.partial(
            joint_rnnt_loss,
            self.project_encoder(encoder_outputs.transpose(1, 2)),
            self.project_prednet(decoder_outputs.transpose(1, 2)),
            weight[:columns],
            None if bias is None else bias[:columns],
            transcripts[:, : decoder_outputs.shape[2] - 1],
            encoder_lengths,
            transcript_lengths,
            blank=self.loss.blank,
            topology=topology,
            fast_emit=self.loss.fast_emit,
            clamp=self.loss.clamp,
            **network,
        )
        return self.loss.cost(loss, transcript_lengths)
