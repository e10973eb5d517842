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
from rnnt_op.memory import Lengths, Workload
from rnnt_op.topology import RNNT

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

NETWORK_OPTIONS: dict[str, Any] = {
    "label_ranges": None,
    "blank": 0,
    "topology": RNNT.text,
    "normalizer": "softmax",
    "delay_penalty": 0.0,
    "activation": "tanh",
    "workspace_bytes": None,
}
"""What :func:`rnnt_op.joint_rnnt_loss` takes where it is told nothing."""

DtypeName = Literal["float64", "float32", "bfloat16"]


def dtype_of(name: DtypeName) -> torch.dtype:
    return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def network_arguments(tensors: Sequence[Any], **options: Any) -> NetworkArguments:
    """What ops on a joint network take: the first seven tensors of ``joint_rnnt_loss``, and
    options."""
    given = {**NETWORK_OPTIONS, "compute_dtype": tensors[0].dtype, **options}
    names = [field.name for field in dataclasses.fields(NetworkArguments)][:7]
    return NetworkArguments(**dict(zip(names, tensors, strict=True)), **given)


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
        return network_arguments((*self.leaves, self.targets, self.frames, self.labels))

    @property
    def workload(self) -> Workload:
        """Of a joint network."""
        weight = self.leaves[2]
        lengths = tuple(zip(self.frames.tolist(), self.labels.tolist(), strict=True))
        return Workload(lengths, len(weight), weight.shape[1], weight.dtype)

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


def random_joint(workload: Workload, *, score_std: float = 1.0, device: str = "cpu") -> Problem:
    """A random joint network whose logits have standard deviation ``score_std``."""
    batch, vocab_size, joint_dim = workload.batch, workload.vocab_size, workload.joint_dim
    # Drawn in their dtype: the states of a big batch need not exist twice.
    options: dict[str, Any] = {"dtype": workload.dtype, "device": device}
    encoder = torch.randn(batch, workload.frames, joint_dim, **options)
    predictor = torch.randn(batch, workload.labels + 1, joint_dim, **options)
    hidden = (encoder[0, :64, None].float() + predictor[0, :64].float()).tanh()
    hidden_norm = hidden.norm(dim=-1).mean()
    weight = torch.randn(vocab_size, joint_dim, device=device) * (score_std / hidden_norm)
    bias = torch.randn(vocab_size, device=device) * (0.1 * score_std)
    return _problem((encoder, predictor, weight, bias), workload, device)


def random_logits(workload: Workload, *, device: str = "cpu") -> Problem:
    """Independent standard normal logits."""
    shape = workload.batch, workload.frames, workload.labels + 1, workload.vocab_size
    return _problem((torch.randn(shape, device=device),), workload, device)


def ragged_lengths(batch: int, frames: int, labels: int) -> Lengths:
    """(T, U) drawn from the upper half of the range; the first sample has full length."""

    def drawn(most: int) -> int:
        return int(torch.randint(most // 2, most + 1, ()))

    return (frames, labels), *((drawn(frames), drawn(labels)) for _ in range(batch - 1))


def recorded_lengths(path: Path, batch: int, seed: int = 0) -> Lengths:
    """(T, U) of each sample, drawn from a file; again from the start where it has too few."""
    import numpy as np

    available = read_lengths(path)
    drawn = np.random.default_rng(seed).permutation(len(available))
    return tuple((int(t), int(u)) for t, u in available[np.resize(drawn, batch)])


def lengths_near(path: Path, frames: int, batch: int) -> Lengths:
    """(T, U) of the samples of a file whose T is nearest to ``frames``; all, if it has fewer."""
    available = read_lengths(path)
    nearest = abs(available[:, 0] - frames).argsort(kind="stable")[:batch]
    return tuple((int(t), int(u)) for t, u in available[nearest])


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


def _problem(leaves: tuple[Tensor, ...], workload: Workload, device: str) -> Problem:
    targets = torch.randint(1, workload.vocab_size, (workload.batch, workload.labels))
    return Problem(
        leaves=tuple(leaf.to(device, workload.dtype) for leaf in leaves),
        targets=targets.to(device),
        frames=torch.tensor([t for t, _ in workload.lengths]),
        labels=torch.tensor([u for _, u in workload.lengths]),
    )
