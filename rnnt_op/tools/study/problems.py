"""Random problems of a given shape: the arguments of a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rnnt_op.arguments import NetworkArguments
from rnnt_op.topology import RNNT

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DtypeName = Literal["float64", "float32", "bfloat16"]


def dtype_of(name: DtypeName) -> torch.dtype:
    return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@dataclass(frozen=True)
class Problem:
    """Arguments of a loss; blank is token 0."""

    leaves: tuple[Tensor, ...]  # (encoder, predictor, weight, bias), or (logits,)
    targets: Tensor  # [B, U]
    frames: Tensor  # T of each sample. [B]
    labels: Tensor  # U of each sample. [B]

    def to(self, dtype: torch.dtype) -> Problem:
        return dataclasses.replace(self, leaves=tuple(leaf.to(dtype) for leaf in self.leaves))

    def loss(self, function: Callable[..., Tensor], **options: Any) -> Tensor:
        return function(*self.leaves, self.targets, self.frames, self.labels, blank=0, **options)

    @property
    def arguments(self) -> NetworkArguments:
        """Of the engine, of a joint network."""
        encoder, predictor, weight, bias = self.leaves
        return NetworkArguments(
            encoder=encoder,
            predictor=predictor,
            weight=weight,
            bias=bias,
            targets=self.targets,
            encoder_lengths=self.frames,
            target_lengths=self.labels,
            label_ranges=None,
            blank=0,
            topology=RNNT.text,
            normalizer="softmax",
            delay_penalty=0.0,
            activation="tanh",
            workspace_bytes=None,
            compute_dtype=encoder.dtype,
        )

    def gradients(
        self, function: Callable[..., Tensor], **options: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and its gradient in each leaf."""
        leaves = tuple(leaf.detach().requires_grad_() for leaf in self.leaves)
        loss = dataclasses.replace(self, leaves=leaves).loss(function, **options)
        return loss.detach(), torch.autograd.grad(loss, leaves)

    @property
    def nodes(self) -> int:
        """Lattice nodes of the batch, padding excluded."""
        return int((self.frames * (self.labels + 1)).sum())


def random_joint(
    lengths: Sequence[tuple[int, int]],
    *,
    vocab_size: int,
    joint_dim: int,
    dtype: torch.dtype,
    score_std: float = 1.0,
    device: str = "cpu",
) -> Problem:
    """A random joint network whose logits have standard deviation ``score_std``.

    Args:
        lengths: (T, U) of each sample.
    """
    batch, frames, labels = _batch_shape(lengths)
    # Drawn in their dtype: the states of a big batch need not exist twice.
    encoder = torch.randn(batch, frames, joint_dim, dtype=dtype, device=device)
    predictor = torch.randn(batch, labels + 1, joint_dim, dtype=dtype, device=device)
    hidden = (encoder[0, :64, None].float() + predictor[0, :64].float()).tanh()
    hidden_norm = hidden.norm(dim=-1).mean()
    weight = torch.randn(vocab_size, joint_dim, device=device) * (score_std / hidden_norm)
    bias = torch.randn(vocab_size, device=device) * (0.1 * score_std)
    return _problem((encoder, predictor, weight, bias), lengths, vocab_size, dtype, device)


def random_logits(
    lengths: Sequence[tuple[int, int]],
    *,
    vocab_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Problem:
    """Independent standard normal logits."""
    batch, frames, labels = _batch_shape(lengths)
    logits = torch.randn(batch, frames, labels + 1, vocab_size, device=device)
    return _problem((logits,), lengths, vocab_size, dtype, device)


def ragged_lengths(batch: int, frames: int, labels: int) -> list[tuple[int, int]]:
    """(T, U) drawn from the upper half of the range; the first sample has full length."""
    drawn = [
        (
            int(torch.randint(frames // 2, frames + 1, ())),
            int(torch.randint(labels // 2, labels + 1, ())),
        )
        for _ in range(batch - 1)
    ]
    return [(frames, labels), *drawn]


def recorded_lengths(path: Path, batch: int, seed: int = 0) -> list[tuple[int, int]]:
    """(T, U) of each sample, drawn from a file; again from the start where it has too few."""
    import numpy as np

    available = read_lengths(path)
    drawn = np.random.default_rng(seed).permutation(len(available))
    return [(int(t), int(u)) for t, u in available[np.resize(drawn, batch)]]


def lengths_near(path: Path, frames: int, batch: int) -> list[tuple[int, int]]:
    """(T, U) of the samples of a file whose T is nearest to ``frames``; all, if it has fewer."""
    available = read_lengths(path)
    nearest = abs(available[:, 0] - frames).argsort(kind="stable")[:batch]
    return [(int(t), int(u)) for t, u in available[nearest]]


def read_lengths(path: Path) -> npt.NDArray[np.integer[Any]]:
    """All (T, U) of a .npy file of [n, 2] integers.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    import numpy as np

    try:
        lengths = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a .npy file: {error}") from error
    if not (
        isinstance(lengths, np.ndarray)
        and lengths.ndim == 2
        and lengths.shape[1] == 2
        and len(lengths) > 0
        and np.issubdtype(lengths.dtype, np.integer)
        and lengths[:, 0].min() >= 1
        and lengths[:, 1].min() >= 0
    ):
        raise ValueError(f"{path}: expected [n, 2] integers, T ≥ 1 and U ≥ 0 of each utterance")
    return lengths


def chosen_samples(problem: Problem, positions: Sequence[int]) -> Problem:
    """A batch of some of a batch's samples."""
    index = torch.tensor(positions)
    encoder, predictor, *output = problem.leaves
    on_device = index.to(encoder.device)
    return Problem(
        leaves=(encoder[on_device], predictor[on_device], *output),
        targets=problem.targets[on_device],
        frames=problem.frames[index],
        labels=problem.labels[index],
    )


def _batch_shape(lengths: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
    return len(lengths), max(t for t, _ in lengths), max(u for _, u in lengths)


def _problem(
    leaves: tuple[Tensor, ...],
    lengths: Sequence[tuple[int, int]],
    vocab_size: int,
    dtype: torch.dtype,
    device: str,
) -> Problem:
    batch, _, labels = _batch_shape(lengths)
    return Problem(
        leaves=tuple(leaf.to(device, dtype) for leaf in leaves),
        targets=torch.randint(1, vocab_size, (batch, labels)).to(device),
        frames=torch.tensor([t for t, _ in lengths]),
        labels=torch.tensor([u for _, u in lengths]),
    )
