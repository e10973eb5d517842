"""The ways to train a transducer that Braun et al. 2022 (arXiv 2211.16270) compare, and this one.

All take the same problem and give the same loss and gradients; what differs is which tensors exist
on the way. Li et al. 2019 (arXiv 1909.12415) describe function merging, the removal of padding and
gradients in the logits' place. :mod:`rnnt_op.memory` predicts what each way holds.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rnnt_op
from rnnt_op.memory import MERGED_ROWS, SPLIT_SAMPLES
from rnnt_op.tools.study.problems import Problem


@dataclass(frozen=True)
class Method:
    """A way to compute the mean loss of a batch and its gradients.

    Args:
        name: its key in ``METHODS``.
        function: the loss, with the arguments of :func:`rnnt_op.joint_rnnt_loss`; autograd knows
            its gradients.
        samples: of the batch that go through ``function`` together, None: all.
    """

    name: str
    function: Callable[..., Tensor]
    samples: int | None = None

    def loss(self, problem: Problem) -> Tensor:
        """The mean loss of the batch, without gradients."""
        with torch.no_grad():
            if self.samples is None:
                return problem.loss(self.function)
            parts = _parts(problem, self.samples)
            losses = [part.loss(self.function, reduction="sum") for _, part in parts]
            return torch.stack(losses).sum() / len(problem.frames)

    def gradients(self, problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mean loss, and its gradients in encoder, predictor, weight and bias."""
        if self.samples is None:
            return problem.gradients(self.function)
        batch = len(problem.frames)
        encoder, predictor, *output = problem.leaves
        d_encoder, d_predictor = torch.zeros_like(encoder), torch.zeros_like(predictor)
        # Not in half: the sum would be rounded with every part.
        real = torch.promote_types(encoder.dtype, torch.float32)
        sums = [torch.zeros_like(leaf, dtype=real) for leaf in output]
        total = sums[0].new_zeros(())

        def mean(*arguments: Any, **options: Any) -> Tensor:
            return self.function(*arguments, **options, reduction="sum") / batch

        # A function, so that nothing of a part is left when the next one starts.
        def add(first: int, part: Problem) -> None:
            loss, (of_frames, of_states, *of_output) = part.gradients(mean)
            total.add_(loss)
            last = first + len(part.frames)
            d_encoder[first:last, : of_frames.shape[1]] = of_frames
            d_predictor[first:last, : of_states.shape[1]] = of_states
            for sum_, gradient in zip(sums, of_output, strict=True):
                sum_ += gradient

        for first, part in _parts(problem, self.samples):
            add(first, part)
        return total, (d_encoder, d_predictor, *(s.to(encoder.dtype) for s in sums))


Loss = Callable[..., Tensor]


def of_logits(rnnt_loss: Loss) -> Loss:
    """The loss of a joint network, from one of logits."""

    def joint_rnnt_loss(
        encoder: Tensor,
        predictor: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        frames: Tensor,
        labels: Tensor,
        *,
        blank: int = 0,
        reduction: str = "mean",
    ) -> Tensor:
        logits = _logits(encoder, predictor, weight, bias)
        return rnnt_loss(logits, targets, frames, labels, blank=blank, reduction=reduction)

    return joint_rnnt_loss


def with_narrow_indices(rnnt_loss: Loss) -> Loss:
    """The loss of a package that takes indices of 32 bits, on the device of the logits."""

    def loss(logits: Tensor, *indices: Tensor, **options: Any) -> Tensor:
        narrow = (index.to(logits.device, torch.int32) for index in indices)
        return rnnt_loss(logits, *narrow, **options)

    return loss


def torchaudio_loss() -> Loss | None:
    """``torchaudio.functional.rnnt_loss``; None where it cannot be imported."""
    try:
        rnnt_loss: Loss = importlib.import_module("torchaudio").functional.rnnt_loss
    except (ImportError, OSError):  # OSError: its binary does not fit this torch
        return None
    return with_narrow_indices(rnnt_loss)


def torchaudio_method() -> Method | None:
    """Logits by torch, then ``torchaudio.functional.rnnt_loss``; float32 and float16 alone.

    Returns:
        None where torchaudio cannot be imported.
    """
    rnnt_loss = torchaudio_loss()
    return None if rnnt_loss is None else Method("torchaudio", of_logits(rnnt_loss))


def _parts(problem: Problem, samples: int) -> Iterator[tuple[int, Problem]]:
    """Some samples at a time, padded to the longest of those: the first's position, and they."""
    encoder, predictor, *output = problem.leaves
    for first in range(0, len(encoder), samples):
        part = slice(first, first + samples)
        frames, labels = problem.frames[part], problem.labels[part]
        longest, most = int(frames.max()), int(labels.max())
        leaves = (encoder[part, :longest], predictor[part, : most + 1], *output)
        targets = problem.targets[part, :most]
        yield first, Problem(leaves=leaves, targets=targets, frames=frames, labels=labels)


def _logits(encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Of every node, padding included. [B, T, U+1, V]"""
    hidden = torch.tanh(encoder.unsqueeze(2) + predictor.unsqueeze(1))
    return F.linear(hidden, weight, bias)


def _recursion(blank: Tensor, label: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
    """Losses from the log-probabilities of blank and next label, both [B, T, U+1]; float. [B]"""
    # As logits of two tokens, which take no softmax.
    targets = torch.ones_like(label[:, 0, 1:], dtype=torch.int64)
    return rnnt_op.reference.rnnt_loss(
        torch.stack((blank, label), -1),
        targets,
        frames,
        labels,
        blank=0,
        reduction="none",
        fused_log_softmax=False,
    )


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses.mean() if reduction == "mean" else losses.sum()


def _next_labels(targets: Tensor, labels: Tensor) -> Tensor:
    """The label that each state would emit next; some token where there is none. [B, U+1]"""
    positions = torch.arange(targets.shape[1], device=targets.device)
    has_label = positions < labels.to(targets.device).unsqueeze(1)
    return F.pad(targets.where(has_label, 0), (0, 1))


def _padding_free(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    frames: Tensor,
    labels: Tensor,
    *,
    blank: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """The batched way over the rows of nodes alone; N = Σ T·(U + 1)."""
    lengths = list(zip(frames.tolist(), labels.tolist(), strict=True))
    # Broadcast sample by sample: the backward of a gather would add up half gradients in half.
    states = zip(encoder.unbind(), predictor.unbind(), lengths, strict=True)
    sums = [(e[:t, None] + p[: u + 1]).flatten(0, 1) for e, p, (t, u) in states]
    hidden = torch.cat(sums)
    del sums
    hidden = torch.tanh(hidden)  # [N, H]
    logits = F.linear(hidden, weight, bias)  # [N, V]
    del hidden
    real = torch.promote_types(logits.dtype, torch.float32)
    log_probs = logits.log_softmax(-1, dtype=real)
    del logits
    next_labels = _next_labels(targets, labels)
    columns = torch.cat([next_labels[b, : u + 1].repeat(t) for b, (t, u) in enumerate(lengths)])
    # Without V, padding costs little.
    t, u = (torch.arange(n, device=weight.device) for n in (encoder.shape[1], predictor.shape[1]))
    of_frames, of_labels = (n.to(weight.device).view(-1, 1, 1) for n in (frames, labels))
    is_node = (t.unsqueeze(1) < of_frames) & (u <= of_labels)  # [B, T, U+1]

    def padded(values: Tensor) -> Tensor:
        return values.new_zeros(is_node.shape).masked_scatter(is_node, values)

    label = log_probs.gather(1, columns.unsqueeze(1)).squeeze(1)
    losses = _recursion(padded(log_probs[:, blank]), padded(label), frames, labels)
    return _reduced(losses, reduction)


def _merged(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    frames: Tensor,
    labels: Tensor,
    *,
    in_place: bool,
    blank: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Softmax and loss as one function of the logits."""
    logits = _logits(encoder, predictor, weight, bias)
    losses: Tensor = _MergedLoss.apply(logits, targets, frames, labels, blank, in_place)  # type: ignore[no-untyped-call]
    return _reduced(losses, reduction)


class _MergedLoss(torch.autograd.Function):
    """Losses of logits, whose gradient is one step: γ·softmax − γ_blank·onehot − γ_label·onehot.

    Probabilities exist for a block of rows at a time. With ``in_place`` the gradient overwrites the
    logits, so that there is one backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [B, T, U+1, V]
        targets: Tensor,
        frames: Tensor,
        labels: Tensor,
        blank: int,
        in_place: bool,
    ) -> Tensor:
        shape, rows = logits.shape[:3], logits.flatten(0, 2)
        columns = _next_labels(targets, labels).unsqueeze(1).expand(shape).reshape(-1, 1)
        real = torch.promote_types(logits.dtype, torch.float32)
        log_sum, blank_score, label_score = logits.new_empty((3, len(rows), 1), dtype=real)
        for block in _blocks(rows):
            values = rows[block].to(real)
            log_sum[block] = values.logsumexp(1, keepdim=True)
            blank_score[block] = values[:, blank, None] - log_sum[block]
            label_score[block] = values.gather(1, columns[block]) - log_sum[block]
        scores = blank_score.view(shape).requires_grad_(), label_score.view(shape).requires_grad_()
        with torch.enable_grad():
            losses = _recursion(scores[0], scores[1], frames, labels)
            total = losses.sum()
        if ctx.needs_input_grad[0]:
            # Those of −log p are minus the posteriors of blank and label.
            occupancies = torch.autograd.grad(total, scores)
            ctx.save_for_backward(logits, log_sum, columns, *occupancies)
            ctx.blank, ctx.in_place = blank, in_place
        return losses.detach()

    @staticmethod
    def backward(ctx: Any, *d_losses: Tensor) -> tuple[Tensor | None, ...]:
        logits, log_sum, columns, *occupancies = ctx.saved_tensors
        weight = d_losses[0].view(-1, 1, 1)
        of_blank, of_label = ((weight * o).view(-1, 1) for o in occupancies)
        d_logits = logits.detach() if ctx.in_place else torch.empty_like(logits)
        rows, d_rows = logits.flatten(0, 2), d_logits.flatten(0, 2)
        for block in _blocks(rows):
            gradient = (rows[block].to(log_sum.dtype) - log_sum[block]).exp_()
            gradient *= -(of_blank[block] + of_label[block])
            gradient[:, ctx.blank, None] += of_blank[block]
            gradient.scatter_add_(1, columns[block], of_label[block])
            d_rows[block] = gradient
        return d_logits, None, None, None, None, None


def _blocks(rows: Tensor) -> Iterator[slice]:
    return (slice(start, start + MERGED_ROWS) for start in range(0, len(rows), MERGED_ROWS))


METHODS = {
    method.name: method
    for method in (
        Method("batched", rnnt_op.reference.joint_rnnt_loss),
        Method("function-merged", functools.partial(_merged, in_place=False)),
        Method("padding-free", _padding_free),
        Method("in-place", functools.partial(_merged, in_place=True)),
        Method("batch-split", rnnt_op.reference.joint_rnnt_loss, samples=SPLIT_SAMPLES),
        Method("one at a time", rnnt_op.reference.joint_rnnt_loss, samples=1),
        Method("rnnt_op", rnnt_op.joint_rnnt_loss),
    )
}
