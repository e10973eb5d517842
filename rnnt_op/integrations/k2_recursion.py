"""The sum over all paths of arcs that have any scores, of which k2's losses are made.

Interface: k2 1.24.4, ``k2/mutual_information.py``; fast_rnnt 1.3 has the same. px are scores of the
arcs that emit a label, [B, S, T+1], or [B, S, T] where a label reads a frame; py of those that read
a frame, [B, S+1, T]; p[s, t] is what the paths from the sample's first node to (s, t) sum up to:

.. code-block:: text

    p[s, t] = log(exp(p[s−1, t] + px[s−1, t]) + exp(p[s, t−1] + py[s, t−1]))      px: [B, S, T+1]
    p[s, t] = log(exp(p[s−1, t−1] + px[s−1, t−1]) + exp(p[s, t−1] + py[s, t−1]))  px: [B, S, T]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnt_op import functional, topologies
from rnnt_op.validation import FLOAT_DTYPES, check_same_dtype, check_tensor

MINUS_INFINITY = float("-inf")


def mutual_information_recursion(
    px: Tensor, py: Tensor, boundary: Tensor | None = None, return_grad: bool = False
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """What all paths of a sample sum up to, p at its last node; differentiable.

    Args:
        px: scores of labels, float64, float32, bfloat16 or float16. [B, S, T+1] or [B, S, T]
        py: scores of blanks, of that dtype. [B, S+1, T]
        boundary: first and last node of each sample, as [s_begin, t_begin, s_end, t_end]; read, so
            best on the CPU. [B, 4] None: [0, 0, S, T]
        return_grad: also return the gradients of the sum of all samples.

    Returns:
        [B], float32 (float64 for float64 scores), −∞ where there is no path; or that and the
        gradients, of px and of py, which are occupancies of the arcs. They are NaN on the nodes of
        a sample without a path.

    Raises:
        TypeError: a dtype is another one, or the two differ.
        ValueError: shapes do not match, or a sample leaves the tensors.
    """
    log_sums = -loss_of_arcs(px, py, boundary, "none")
    return (log_sums, gradients_of_arcs(px, py, boundary)) if return_grad else log_sums


def joint_mutual_information_recursion(
    px: Sequence[Tensor], py: Sequence[Tensor], boundary: Tensor | None = None
) -> Tensor:
    """:func:`mutual_information_recursion` of scores that are sums of N terms, told apart.

    Args:
        px, py: the terms, N tensors each. [B, S, T+1] or [B, S, T]; [B, S+1, T]
        boundary: as there.

    Returns:
        What each term contributes: its mean over paths, and for the first one also what the sum
        over paths has beyond the mean, so that all of them sum up to the recursion of the sums. The
        gradient is that of the means with occupancies held fixed, which is that of the recursion.
        [N, B]

    Raises:
        TypeError, ValueError: as there, or the numbers of terms differ.
    """
    if not px or len(px) != len(py):
        raise ValueError(f"px, py: expected as many terms, got {len(px)} and {len(py)}")
    labels, frames = (torch.stack(list(terms)) for terms in (px, py))
    sums = labels.detach().sum(0), frames.detach().sum(0)
    log_sums = -loss_of_arcs(*sums, boundary, "none")
    gradients = gradients_of_arcs(*sums, boundary)
    means = torch.zeros_like(log_sums)
    for terms, gradient in zip((labels, frames), gradients, strict=True):
        # A term of an arc that no path uses may be −∞, and counts for nothing.
        finite = terms.clamp(min=torch.finfo(terms.dtype).min)
        means = means + torch.einsum("bst,nbst->nb", gradient, finite)
    beyond = log_sums - means.detach().sum(0)
    return means + F.pad(beyond.unsqueeze(0), (0, 0, 0, len(px) - 1))


def loss_of_arcs(px: Tensor, py: Tensor, boundary: Tensor | None, reduction: str) -> Tensor:
    """−p at the last node of each sample, reduced as losses are. [B] or []

    It is a transducer loss of one frame more, which the paths leave by a blank whose score is 0.
    """
    limits = _limits(px, py, boundary)
    label_reads_frame = px.shape[2] == py.shape[2]
    label = F.pad(px, (0, int(label_reads_frame), 0, 1), value=MINUS_INFINITY)
    blank = F.pad(py, (0, 1), value=MINUS_INFINITY)
    begin, end = limits.split(2, 1)
    if begin.any():  # lattices begin at (0, 0)
        label, blank = (
            torch.stack(
                [
                    F.pad(sample[s:, t:], (0, t, 0, s))
                    for sample, (s, t) in zip(scores, begin.tolist(), strict=True)
                ]
            )
            for scores in (label, blank)
        )
    labels, frames = (end - begin).unbind(1)
    s_end, t_end = (length.to(px.device).view(-1, 1, 1) for length in (labels, frames))
    is_last_frame = torch.arange(blank.shape[2], device=px.device) == t_end
    is_last_state = torch.arange(blank.shape[1], device=px.device).unsqueeze(1) == s_end
    blank = blank.masked_fill(is_last_frame & is_last_state, 0)
    if label_reads_frame:
        label = label.masked_fill(is_last_frame, MINUS_INFINITY)
    return functional.rnnt_loss(
        torch.stack([blank, label], 3).transpose(1, 2),
        torch.ones(px.shape[:2], dtype=torch.int64, device=px.device),
        frames + 1,
        labels,
        blank=0,
        topology=topologies.modified() if label_reads_frame else topologies.RNNT,
        reduction=reduction,
        fused_log_softmax=False,
    )


def gradients_of_arcs(px: Tensor, py: Tensor, boundary: Tensor | None) -> tuple[Tensor, Tensor]:
    """The second result of :func:`mutual_information_recursion` alone."""
    with torch.enable_grad():
        px, py = (scores.detach().requires_grad_() for scores in (px, py))
        of_px, of_py = torch.autograd.grad(-loss_of_arcs(px, py, boundary, "sum"), (px, py))
    return of_px, of_py


def with_delay_penalty(px: Tensor, py: Tensor, boundary: Tensor | None, penalty: float) -> Tensor:
    """px in which a label at frame t scores λ·((T − 1)/2 − t) more. [B, S, T+1] or [B, S, T]"""
    frames = boundary[:, 3].to(px.device).view(-1, 1, 1) if boundary is not None else py.shape[2]
    t = torch.arange(px.shape[2], device=px.device, dtype=px.dtype)
    return px + penalty * ((frames - 1) / 2 - t)


def _limits(px: Tensor, py: Tensor, boundary: Tensor | None) -> Tensor:
    """The boundary, on the CPU, once all arguments are checked. [B, 4]"""
    check_tensor("px", px, FLOAT_DTYPES)
    check_same_dtype(px=px, py=py)
    if px.dim() != 3 or py.dim() != 3 or px.shape[2] - py.shape[2] not in (0, 1):
        raise ValueError(
            "px, py: expected shapes (B, S, T + 1) or (B, S, T), and (B, S + 1, T), got "
            f"{tuple(px.shape)} and {tuple(py.shape)}"
        )
    batch, labels, frames = px.shape[0], px.shape[1], py.shape[2]
    if py.shape[:2] != (batch, labels + 1):
        expected = (batch, labels + 1, frames)
        raise ValueError(f"py: expected shape {expected}, got {tuple(py.shape)}")
    if boundary is None:
        return torch.tensor([0, 0, labels, frames]).expand(batch, 4)
    if boundary.shape != (batch, 4):
        raise ValueError(f"boundary: expected shape ({batch}, 4), got {tuple(boundary.shape)}")
    limits = boundary.to("cpu", torch.int64)
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(limits.tolist()):
        if not (0 <= s_begin <= s_end <= labels and 0 <= t_begin <= t_end <= frames):
            raise ValueError(
                f"boundary: expected 0 <= s_begin <= s_end <= {labels} and 0 <= t_begin <= t_end "
                f"<= {frames}, got {[s_begin, t_begin, s_end, t_end]} at sample {b}"
            )
    return limits
