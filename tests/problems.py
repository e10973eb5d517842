"""Random transducer problems and the distances tests measure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from rnnt_op.arguments import JointArguments, LogitsArguments
from rnnt_op.tools.study.correctness import relative_error as relative_error
from rnnt_op.tools.study.problems import NETWORK_OPTIONS, network_arguments

NAN = float("nan")


@dataclass(frozen=True)
class JointProblem:
    """Arguments of ``joint_rnnt_loss``."""

    encoder: Tensor
    predictor: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    encoder_lengths: Tensor
    target_lengths: Tensor
    blank: int = 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (
            *self.differentiable,
            *((None,) if self.bias is None else ()),
            self.targets,
            self.encoder_lengths,
            self.target_lengths,
        )

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        tensors = (self.encoder, self.predictor, self.weight, self.bias)
        return tuple(t for t in tensors if t is not None)

    def to(self, dtype: torch.dtype) -> JointProblem:
        """A copy whose differentiable tensors are leaves of another dtype."""
        copies = [t.detach().to(dtype).clone().requires_grad_() for t in self.differentiable]
        return replace(
            self,
            encoder=copies[0],
            predictor=copies[1],
            weight=copies[2],
            bias=None if self.bias is None else copies[3],
        )

    def poisoned(self) -> JointProblem:
        """The same problem with NaN encoder and predictor states and wild labels in the padding."""
        encoder, predictor = self.encoder.detach().clone(), self.predictor.detach().clone()
        targets = self.targets.clone()
        for b, (t, u) in enumerate(zip(self.encoder_lengths, self.target_lengths, strict=True)):
            encoder[b, t:] = NAN
            predictor[b, u + 1 :] = NAN
            targets[b, u:] = torch.iinfo(targets.dtype).min
        return replace(
            self,
            encoder=encoder.requires_grad_(),
            predictor=predictor.requires_grad_(),
            targets=targets,
        )


def random_joint(
    batch: int = 3,
    frames: int = 7,
    labels: int = 5,
    joint_dim: int = 8,
    vocab_size: int = 11,
    *,
    bias: bool = True,
    blank: int = 0,
    dtype: torch.dtype = torch.float64,
    lengths: Sequence[tuple[int, int]] | None = None,
    scale: float = 1.0,
) -> JointProblem:
    """A ragged problem; at least one sample has full length, unless ``lengths`` says (T, U) of
    each."""
    if lengths is None:
        drawn = [
            (int(torch.randint(1, frames + 1, ())), int(torch.randint(0, labels + 1, ())))
            for _ in range(batch)
        ]
        drawn[int(torch.randint(batch, ()))] = (frames, labels)
        lengths = drawn

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    return JointProblem(
        encoder=leaf(batch, frames, joint_dim),
        predictor=leaf(batch, labels + 1, joint_dim),
        weight=leaf(vocab_size, joint_dim),
        bias=leaf(vocab_size) if bias else None,
        targets=random_labels((batch, labels), vocab_size, blank),
        encoder_lengths=torch.tensor([t for t, _ in lengths]),
        target_lengths=torch.tensor([u for _, u in lengths]),
        blank=blank,
    )


def random_labels(shape: tuple[int, ...], vocab_size: int, blank: int) -> Tensor:
    if vocab_size == 1:
        return torch.zeros(shape, dtype=torch.int64)
    labels = torch.randint(0, vocab_size - 1, shape)
    return labels + (labels >= blank % vocab_size)


def loss_and_gradients(
    function: Callable[..., Tensor], problem: JointProblem, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss = function(*problem.arguments, blank=problem.blank, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), problem.differentiable)


def enumerated_loss(log_probs: Tensor, labels: Sequence[int], blank: int) -> Tensor:
    """−log of the sum over every path, written out: a path is an order of T blanks and U labels
    that ends in blank.

    Args:
        log_probs: [T, U+1, V]
        labels: the sample's labels. U
        blank: index of the blank token.
    """
    frames, total = log_probs.shape[0], log_probs.shape[0] - 1 + len(labels)
    paths = []
    for emitting in itertools.combinations(range(total), len(labels)):
        t = u = 0
        score = log_probs.new_zeros(())
        for step in range(total):
            if step in emitting:
                score = score + log_probs[t, u, labels[u]]
                u += 1
            else:
                score = score + log_probs[t, u, blank]
                t += 1
        assert t == frames - 1
        paths.append(score + log_probs[t, u, blank])
    return -torch.stack(paths).logsumexp(0)


LOSS_OPTIONS: dict[str, Any] = {"fast_emit": 0.0, "clamp": -1.0, "zero_infinity": False}


def joint_arguments(tensors: Sequence[Any], **options: Any) -> JointArguments:
    """Those of a loss, beside ``network_arguments``."""
    given = {**vars(network_arguments(tensors)), **LOSS_OPTIONS}
    given |= {"dropout": 0.0, "gradient_tolerance": 0.0, **options}
    return JointArguments(**given)


def logits_arguments(tensors: Sequence[Any], **options: Any) -> LogitsArguments:
    """What ops on given logits take: the first four tensors of ``rnnt_loss``, and options."""
    names = ("logits", "targets", "logit_lengths", "target_lengths")
    given = {**NETWORK_OPTIONS, **LOSS_OPTIONS, "fused_log_softmax": True, **options}
    del given["activation"]
    return LogitsArguments(**dict(zip(names, tensors, strict=True)), **given)


def check_op(name: str, arguments: Sequence[Any], *, traced: bool = True) -> None:
    """torch's own checks of an op: schema, fake kernel, autograd, and the same in a traced graph."""
    op = getattr(torch.ops.rnnt_op, name).default
    opcheck(
        op, arguments, test_utils=["test_schema", "test_autograd_registration", "test_faketensor"]
    )
    if name in ("joint_loss_with_grads", "posteriors", "align"):
        # The check would differentiate all outputs; of gradients and posteriors that is refused.
        arguments = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    if traced:
        opcheck(op, arguments, test_utils=["test_aot_dispatch_dynamic"])


class CountCalls(TorchDispatchMode):
    """How often each op of the namespace runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rnnt_op":
            self.calls[func._opname] = self.calls.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))
