"""NeMo's Numba losses by their own names: what a NeMo ``RNNTLoss`` calls, and other code imports.

Interface: nemo-toolkit 3.0.0, ``nemo/collections/asr/parts/numba/rnnt_loss/rnnt_pytorch.py``, whose
names, arguments and defaults these are. ``"mean"`` is the mean over the batch, though its
docstrings divide by labels; a reduced loss has shape [1]. Nothing here imports NeMo or Numba, and
all of it runs on the CPU, too.

FastEmit's λ is in gradients alone: the loss is that of λ = 0. NeMo reports 1 + λ times it, and so
do these with ``fastemit_cost=True``, which is not NeMo's; gradients are the same either way.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor, nn

from rnnt_op import functional
from rnnt_op.integrations.reductions import with_fast_emit_cost
from rnnt_op.topologies import RNNT, Topology, multi_blank, tdt
from rnnt_op.validation import check_choice

__all__ = ["MultiblankRNNTLossNumba", "RNNTLossNumba", "TDTLossNumba"]


class RNNTLossNumba(nn.Module):
    """The regular transducer.

    Args:
        blank: index of the blank.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` over the batch.
        fastemit_lambda: FastEmit's λ.
        clamp: as in :func:`rnnt_op.rnnt_loss`, and in NeMo on a GPU. On a CPU NeMo clamps what is
            left after the division by the batch size.
        fastemit_cost: report (1 + λ) times the loss.

    Raises:
        ValueError: there is no such reduction.
    """

    topology: Topology = RNNT

    def __init__(
        self,
        blank: int = 0,
        reduction: str = "mean",
        fastemit_lambda: float = 0.0,
        clamp: float = -1,
        *,
        fastemit_cost: bool = False,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("none", "sum", "mean"))
        self.blank = blank
        self.reduction = reduction
        self.fastemit_lambda = fastemit_lambda
        self.clamp = float(clamp) if clamp > 0 else 0.0
        self.fastemit_cost = fastemit_cost

    def forward(self, acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            acts: logits; with TDT the durations' columns come last. [B, T, U+1, V]
            labels: labels, int32 or int64. [B, U]
            act_lens: frames T of each sample. [B]
            label_lens: labels U of each sample. [B]

        Returns:
            The loss in nats. [B] or [1]

        Raises:
            TypeError, ValueError, RuntimeError: as in :func:`rnnt_op.rnnt_loss`.
        """
        topology, columns = self._lattice(acts.shape[-1])
        loss = functional.rnnt_loss(
            acts[..., :columns],
            labels,
            act_lens,
            label_lens,
            blank=self.blank,
            clamp=self.clamp,
            topology=topology,
            fast_emit=self.fastemit_lambda,
            reduction=self.reduction,
        )
        if self.fastemit_cost:
            loss = with_fast_emit_cost(loss, self.fastemit_lambda)
        return loss if self.reduction == "none" else loss.unsqueeze(0)

    def _lattice(self, columns: int) -> tuple[Topology, int]:
        """That of a call, and how many columns of the logits it takes."""
        return self.topology, columns


class MultiblankRNNTLossNumba(RNNTLossNumba):
    """The multi-blank transducer.

    Args:
        blank: index of the blank; the big blanks are the tokens before it, the first duration's
            next to it, as in :func:`rnnt_op.topologies.multi_blank`.
        big_blank_durations: frames that each reads.
        reduction, fastemit_lambda, clamp, fastemit_cost: as in :class:`RNNTLossNumba`.
        sigma: logit under-normalisation: taken from every token's log-probability.

    Raises:
        ValueError: there is no such reduction, or the durations are none that the lattice knows.
    """

    def __init__(
        self,
        blank: int,
        big_blank_durations: Sequence[int],
        reduction: str = "mean",
        fastemit_lambda: float = 0.0,
        clamp: float = -1,
        sigma: float = 0.0,
        *,
        fastemit_cost: bool = False,
    ) -> None:
        super().__init__(blank, reduction, fastemit_lambda, clamp, fastemit_cost=fastemit_cost)
        self.big_blank_durations = big_blank_durations
        self.sigma = sigma
        columns = [blank - 1 - i for i in range(len(big_blank_durations))]
        self.topology = multi_blank(big_blank_durations, columns=columns, sigma=sigma)


class TDTLossNumba(RNNTLossNumba):
    """The token-and-duration transducer.

    Args:
        blank: index of the blank among the tokens.
        durations: frames that a symbol may read, in the order of their columns.
        reduction: as in :class:`RNNTLossNumba`.
        fastemit_lambda, clamp: none; NeMo applies them to the gradient of the tokens alone.
        sigma: logit under-normalisation: taken from every token's log-probability.
        omega: probability with which a call takes the regular loss of the tokens instead, without
            σ and durations. One draw for the whole batch, of Python's ``random``.

    Raises:
        ValueError: FastEmit or a clamp is asked for, there is no such reduction, or the durations
            are none that the lattice knows.
    """

    def __init__(
        self,
        blank: int,
        durations: Sequence[int] | None = None,
        reduction: str = "mean",
        fastemit_lambda: float = 0.0,
        clamp: float = -1,
        sigma: float = 0.0,
        omega: float = 0.0,
    ) -> None:
        for name, is_on in (("fastemit_lambda", fastemit_lambda != 0), ("clamp", clamp > 0)):
            if is_on:
                raise ValueError(
                    f"{name}: expected none with TDT, where NeMo applies it to the gradient of the "
                    "tokens and not to that of the durations; rnnt_op.rnnt_loss applies it to both"
                )
        super().__init__(blank, reduction)
        self.durations = durations if durations is not None else []
        self.sigma = sigma
        self.omega = omega
        self.topology = tdt(self.durations, sigma=sigma)

    def _lattice(self, columns: int) -> tuple[Topology, int]:
        # As NeMo draws, so that the same seed gives the same losses.
        if random.uniform(0, 1) < self.omega:
            return RNNT, self.topology.tokens(columns)
        return self.topology, columns
