"""What the loss is measured beside on a GPU: one GEMM, and other ways to the same gradients.

Each of the others takes a problem and gives the loss and its gradients in encoder, predictor,
weight and bias. They are written here from what is published of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rnnt_op
from rnnt_op.memory import Workload
from rnnt_op.tools.study.problems import Problem

TILE_ROWS = 200_000  # nodes whose logits Flash RNN-T computes at a time

Gradients = tuple[Tensor, tuple[Tensor, ...]]


def gemm(
    problem: Problem, result_dtype: torch.dtype, limit_bytes: float
) -> tuple[Callable[[], object], str]:
    """Hidden states of all nodes times the weight, in one GEMM or into a reused buffer.

    Rows of the result begin at multiples of 16 bytes: where V does not give that, a GEMM into rows
    without padding takes slower kernels, and what is compared with it looks better than it is.
    """
    weight, nodes = problem.leaves[2], problem.nodes
    vocab_size, size = len(weight), result_dtype.itemsize
    hidden = torch.randn(nodes, weight.shape[1], device=weight.device).to(weight.dtype)
    pitch = -(-vocab_size * size // 16) * 16 // size
    whole = nodes * pitch * size <= limit_bytes
    rows = nodes if whole else min(nodes, 2**16)
    result = weight.new_empty((rows, pitch), dtype=result_dtype)[:, :vocab_size]
    options = {} if result_dtype == weight.dtype else {"out_dtype": result_dtype}

    def run() -> None:
        for part in hidden.split(rows):
            torch.mm(part, weight.t(), out=result[: len(part)], **options)

    how = "one call" if whole else f"chunks of {rows} rows into one buffer"
    return run, how if pitch == vocab_size else f"{how}, rows padded to {pitch}"


def torchaudio_pieces(workload: Workload, limit_bytes: float) -> int:
    """Into how many pieces a batch is cut so that torchaudio's way takes no more memory."""
    nodes, vocab_size = workload.frames * (workload.labels + 1), workload.vocab_size
    size = workload.dtype.itemsize
    # Two of the hidden states; logits in both dtypes, their gradient in both.
    node_bytes = 2 * workload.joint_dim * size + 2 * vocab_size * (4 + size)
    # torchaudio indexes elements with 32 bits.
    most = min(limit_bytes / node_bytes, (2**31 - 1) / vocab_size) / nodes
    return -(-workload.batch // max(1, int(most)))


@cache
def torchaudio_loss(device: str) -> Callable[..., Tensor]:
    """``torchaudio.functional.rnnt_loss``.

    Raises:
        RuntimeError: it is not usable here; says why.
    """
    try:
        loss: Callable[..., Tensor] = importlib.import_module("torchaudio").functional.rnnt_loss
        logits = torch.randn(1, 3, 2, 4, device=device)
        targets, frames, labels = (
            torch.tensor(value, dtype=torch.int32, device=device) for value in ([[1]], [3], [1])
        )
        loss(logits, targets, frames, labels, blank=0)
    except Exception as error:  # a library that cannot be loaded raises anything
        raise RuntimeError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    return loss


def torchaudio_gradients(limit_bytes: float, problem: Problem) -> Gradients:
    """The joint network on padded logits, then torchaudio's loss in float32."""
    encoder, _, weight, bias = problem.leaves
    loss_of = torchaudio_loss(str(encoder.device))
    batch = len(problem.frames)
    losses, states = [], []
    shared = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in (weight, bias)]
    samples = -(-batch // torchaudio_pieces(problem.workload, limit_bytes))
    for start in range(0, batch, samples):
        part = slice(start, start + samples)
        loss, (d_encoder, d_predictor, *d_shared) = _torchaudio_piece(loss_of, problem, part)
        losses.append(loss)
        states.append((d_encoder, d_predictor))
        for total, each in zip(shared, d_shared, strict=True):
            total += each
    d_encoder, d_predictor = (torch.cat(each) for each in zip(*states, strict=True))
    d_weight, d_bias = (total.to(weight.dtype) for total in shared)
    return torch.stack(losses).sum(), (d_encoder, d_predictor, d_weight, d_bias)


def _torchaudio_piece(loss_of: Callable[..., Tensor], problem: Problem, part: slice) -> Gradients:
    encoder, predictor, weight, bias = problem.leaves
    leaves = tuple(
        leaf.detach().requires_grad_() for leaf in (encoder[part], predictor[part], weight, bias)
    )
    frames, labels = problem.frames[part], problem.labels[part]
    longest, most = int(frames.max()), int(labels.max())
    hidden = (leaves[0][:, :longest, None] + leaves[1][:, None, : most + 1]).tanh()
    logits = F.linear(hidden, leaves[2], leaves[3]).float()
    loss = loss_of(
        logits,
        problem.targets[part, :most].int().contiguous(),
        frames.int().to(logits.device),
        labels.int().to(logits.device),
        blank=0,
        reduction="sum",
    ) / len(encoder)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def batched_gradients(problem: Problem) -> Gradients:
    """Plain torch, all logits at once."""
    return problem.gradients(rnnt_op.reference.joint_rnnt_loss)


def flash_gradients(problem: Problem, tile_rows: int = TILE_ROWS) -> Gradients:
    """As ``flash_rnnt_loss``."""
    return problem.gradients(partial(flash_rnnt_loss, tile_rows=tile_rows))


def flash_rnnt_loss(
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
    tile_rows: int = TILE_ROWS,
) -> Tensor:
    """NeMo's "Flash RNN-T" as it is described: no logits outlive a tile of packed nodes.

    A tile's log-softmax leaves two float32 numbers of a node, the log-probabilities of blank and
    next label, from which the recursion starts. In the backward pass every tile's logits are
    computed again, by activation checkpointing. Described are tiles of 200,000; rows are taken
    here, the larger and so the faster reading. The recursion is this package's own, faster than
    torch operations would be. Both choices favour it.
    """
    lengths = list(zip(frames.tolist(), labels.tolist(), strict=True))
    u = torch.arange(predictor.shape[1], device=weight.device)
    t = torch.arange(encoder.shape[1], device=weight.device)
    of_frames, of_labels = (n.to(weight.device).view(-1, 1, 1) for n in (frames, labels))
    is_node = (t.unsqueeze(1) < of_frames) & (u <= of_labels)  # [B, T, U+1]
    next_labels = F.pad(targets.where(u[:-1] < of_labels.squeeze(2), 0), (0, 1))  # [B, U+1]

    def scores_of(pieces: Sequence[Piece]) -> Tensor:
        return _tile_scores(pieces, encoder, predictor, weight, bias, next_labels, blank)

    scores = torch.cat(
        [checkpoint(scores_of, pieces, use_reentrant=False) for pieces in tiles(lengths, tile_rows)]
    )
    planes = scores.new_zeros((*is_node.shape, 2)).masked_scatter(is_node.unsqueeze(3), scores)
    return rnnt_op.rnnt_loss(
        planes,  # as logits of two tokens, which take no softmax
        torch.ones_like(targets),
        frames,
        labels,
        blank=0,
        reduction=reduction,
        fused_log_softmax=False,
    )


Piece = tuple[int, slice, int]
"""Some frames of a sample: which sample, which frames, and how many states each has."""


def tiles(lengths: Sequence[tuple[int, int]], rows: int) -> Iterator[list[Piece]]:
    """All nodes in order, as whole frames of up to ``rows`` nodes together."""
    pieces: list[Piece] = []
    left = rows
    for sample, (frames, labels) in enumerate(lengths):
        states, first = labels + 1, 0
        while first < frames:
            if pieces and left < states:
                yield pieces
                pieces, left = [], rows
            last = min(frames, first + max(1, left // states))
            pieces.append((sample, slice(first, last), states))
            left -= (last - first) * states
            first = last
    if pieces:
        yield pieces


def _tile_scores(
    pieces: Sequence[Piece],
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_labels: Tensor,
    blank: int,
) -> Tensor:
    """Log-probabilities of blank and next label of a tile's nodes. [R, 2]"""
    # Broadcast piece by piece: the backward of a gather would add up half gradients in half.
    sums = [(encoder[b, t, None] + predictor[b, :states]).flatten(0, 1) for b, t, states in pieces]
    logits = F.linear(torch.cat(sums).tanh(), weight, bias)  # [R, V]
    log_probs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    columns = torch.cat(
        [next_labels[b, :states].repeat(t.stop - t.start) for b, t, states in pieces]
    )
    label = log_probs.gather(1, columns.unsqueeze(1)).squeeze(1)
    return torch.stack((log_probs[:, blank], label), 1)
