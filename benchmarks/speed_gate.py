"""Whether a way to the gradients is right, before it is timed; what it keeps and takes.

It is compared with float64 on a small problem, and on two samples of the batch that is to be timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from on_device import bytes_of, with_peak_bytes
from rivals import Gradients
from torch import Tensor

import rnnt_op
from rnnt_op.tools.study.correctness import gradient_bar, relative_error, wrong_by
from rnnt_op.tools.study.measure import kept_fraction
from rnnt_op.tools.study.problems import Problem, chosen_samples


@dataclass
class Candidate:
    """A way to the gradients, and what is known of it so far."""

    way: Callable[[Problem], Gradients]
    problem: Problem
    note: str = ""
    wrong: str = ""  # by how much it differs, or how it failed: it is not timed
    kept_percent: float | None = None
    bytes: int | None = None
    error: float | None = None  # of two samples' gradients

    def run(self) -> Gradients:
        return self.way(self.problem)


class Truth:
    """Gradients of the first and the last sample of a batch, in float64, and how near they are."""

    def __init__(self, problem: Problem) -> None:
        batch = len(problem.frames)
        self._ends = sorted({0, batch - 1})
        self._scale = batch / len(self._ends)  # of means over their batch
        few = chosen_samples(problem, self._ends)
        reference = rnnt_op.reference.joint_rnnt_loss
        self._states = few.to(torch.float64).gradients(reference)[1][:2]
        plain = few.gradients(reference)[1][:2]
        # Others run the recursion in float32, and round gradients to bfloat16.
        least = 1e-2 if problem.leaves[0].dtype == torch.float32 else 3e-2
        self.bar = max(least, 2 * relative_error(plain, self._states))

    def error(self, gradients: Sequence[Tensor]) -> float:
        states = [gradient[self._ends].double() * self._scale for gradient in gradients[:2]]
        return relative_error(states, self._states)


def rival_bar(dtype: torch.dtype, plain_error: float) -> float:
    return max(1e-2 if dtype == torch.float32 else 3e-2, gradient_bar(dtype, plain_error))


def check(candidate: Candidate, truth: Truth | None, device: str, *, is_ours: bool) -> None:
    """Runs a candidate: by how much it differs, what it keeps and what memory it takes."""
    way, problem = candidate.way, candidate.problem
    try:
        wrong = wrong_by(
            lambda small: way(small)[0],
            way,
            problem.leaves[0].dtype,
            device,
            bar_of=gradient_bar if is_ours else rival_bar,
        )
        if wrong is not None:
            candidate.wrong = f"differs on a small problem: {wrong}"
            return
        (_, gradients), before, peak = with_peak_bytes(device, candidate.run)
        candidate.bytes = peak - before - bytes_of(gradients)
        if truth is not None:
            candidate.error = truth.error(gradients[:2])
            if not candidate.error <= truth.bar:  # nor where it is NaN
                candidate.wrong = f"differs by {candidate.error:.1e} (bar {truth.bar:.1e})"
        if is_ours and not candidate.wrong:
            candidate.kept_percent = 100 * kept_fraction(problem, candidate.run)
    except Exception as error:  # whatever it is, the others are measured all the same
        candidate.wrong = f"failed: {first_line(error)}"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
