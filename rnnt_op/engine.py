"""The sample-wise algorithm: score → lattice → select → backward, a group of samples at a time.

Logits exist a chunk of node rows at a time. The score pass keeps the log-probability of each
node's symbols, on a CPU only where paths reach the node; the lattice turns them into
log-likelihoods and occupancies; selection keeps the nodes that carry gradient; the backward pass
recomputes the logits of those alone, unless there was room to keep them. Method: Braun, McDermott,
Hsiao 2023 (arXiv 2211.16270), with node rows instead of padded samples and the selection of
``gradient_tolerance``.

How many nodes are kept is known on the device first. A backend that would have to wait for the
number has two groups in flight: the scores of the next group are issued before it is read.

Posteriors and best paths take the score pass and a lattice, without a backward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnt_op.backends.records import Lattice, Logits
from rnnt_op.logits import LogitSource
from rnnt_op.nodes import RowIndex, Rows
from rnnt_op.scoring import SavedScores, Scored, Scorer
from rnnt_op.task import Task

# Of the gradient that may be skipped.
_UNSCORED_SHARE = 1 / 32


def sweep(
    task: Task,
    source: LogitSource,
    *,
    weights: Tensor | None,
    gradient_tolerance: float = 0.0,
    clamp: float = 0.0,
    zero_infinity: bool = False,
    saved: SavedScores | None = None,
) -> Tensor:
    """Losses of a batch and, given weights, the gradients of Σ_b weights[b]·loss[b] in ``source``.

    A sample whose loss is not finite contributes NaN to the gradients that it takes part in, or,
    with ``zero_infinity``, loss and gradient zero. It leaves the rows of other samples alone, and
    so does any sample whose weight is zero.

    Args:
        task: the batch, its lattice, and what serves it.
        source: where logits come from and their gradient goes.
        weights: gradient with respect to each sample's loss, None for losses alone. [B]
        gradient_tolerance: share of each sample's logit-gradient L1 mass that may be skipped.
        clamp: bound on the elements of the unit-scale logit gradient; none if not positive.
        zero_infinity: set losses that are not finite, and their gradients, to zero.
        saved: where the scores go, or come from if they are known.

    Returns:
        Losses, float64. [B]
    """
    may_skip = task.topology.is_substochastic and task.normalize and task.shard is None
    skipped = gradient_tolerance * _UNSCORED_SHARE if may_skip else 0.0
    scorer = Scorer.of(task, source, task.topology, skipped, saved)
    batch = task.batch
    losses = torch.empty(len(batch.frames), dtype=torch.float64, device=batch.targets.device)
    work = _Sweep(scorer, losses, weights, gradient_tolerance, clamp, zero_infinity)
    in_flight: deque[_Occupied] = deque()
    for scored in scorer.groups():
        occupied = work.forward(scored)
        if occupied is not None:
            in_flight.append(occupied)
        del scored, occupied
        if len(in_flight) == task.backend.GROUPS_IN_FLIGHT:
            work.backward(in_flight.popleft())
    while in_flight:
        work.backward(in_flight.popleft())
    return losses


def posteriors(
    task: Task, source: LogitSource, max_frames: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """How often the path takes a blank, and a label, of each node.

    Args:
        task, source: as in ``sweep``.
        max_frames: T of the occupancies.
        dtype: of the occupancies.

    Returns:
        Occupancy of the blanks and of the labels of each node; zero where there is no node, and
        where a sample has no path. [B, T, U + 1, 2]
        Log-likelihoods, float64. [B]
    """
    batch, counting = task.batch, task.topology.counted()
    scorer = Scorer.of(task, source, counting)
    samples, max_labels = batch.targets.shape
    shape = (samples, max_frames, max_labels + 1, 2)
    occupancies = torch.zeros(shape, dtype=dtype, device=batch.targets.device)
    log_likelihoods = occupancies.new_empty(samples, dtype=torch.float64)

    def compute(scored: Scored) -> None:
        nodes, packed = scored.nodes, scored.nodes.packed
        lattice = task.backend.forward_backward(
            counting, nodes, F.pad(scored.scores, (0, 2)), occupancies=True
        )
        assert lattice.occupancy is not None
        log_likelihoods[packed.samples] = lattice.log_likelihood
        has_path = lattice.log_likelihood != -torch.inf
        is_used = has_path.index_select(0, nodes.sample_of(nodes.rows)).unsqueeze(1)
        b, t = packed.frame_positions
        first = ((b * max_frames + t) * (max_labels + 1)).index_select(0, nodes.rows.frame)
        row = first + packed.state_index.index_select(0, nodes.rows.state)
        occupancies.view(-1, 2).index_copy_(
            0, row, lattice.occupancy[:, -2:].where(is_used, 0.0).to(dtype)
        )

    for scored in scorer.groups():
        compute(scored)
        del scored
    return occupancies, log_likelihoods


def align(task: Task, source: LogitSource) -> tuple[Tensor, Tensor]:
    """The most probable path of each sample.

    Args:
        task, source: as in ``sweep``.

    Returns:
        Frame that emits each label, −1 where there is no label or no path, int64. [B, U]
        Log-probability of the path, float64. [B]
    """
    batch = task.batch
    scorer = Scorer.of(task, source, task.topology)
    samples, max_labels = batch.targets.shape
    device = batch.targets.device
    frames = torch.full((samples, max_labels + 1), -1, dtype=torch.int64, device=device)
    log_probabilities = torch.empty(samples, dtype=torch.float64, device=device)

    def compute(scored: Scored) -> None:
        packed = scored.nodes.packed
        best = task.backend.best_paths(task.topology, scored.nodes, scored.scores)
        log_probabilities[packed.samples], frames[packed.state_positions] = best

    for scored in scorer.groups():
        compute(scored)
        del scored
    return frames[:, :max_labels].contiguous(), log_probabilities


@dataclass(frozen=True)
class _Occupied:
    """A group whose gradient is still to come."""

    scored: Scored
    occupancy: Tensor  # [N, S]
    weight: Tensor  # gradient of the scalar with respect to each sample's loss. [S]
    selection: Callable[[], Tensor]


@dataclass(frozen=True)
class _Sweep:
    scorer: Scorer
    losses: Tensor
    weights: Tensor | None
    gradient_tolerance: float
    clamp: float
    zero_infinity: bool

    def forward(self, scored: Scored) -> _Occupied | None:
        """Losses of a group and, where gradients are wanted, what they take."""
        backend, topology = self.scorer.task.backend, self.scorer.task.topology
        nodes, reached = scored.nodes, scored.reached
        lattice = self._lattice(scored)
        tolerance = self.gradient_tolerance
        if reached is not None and lattice.occupancy is not None:
            missing = reached.rest(lattice.occupancy)
            if len(missing) > 0:
                # It must be gone before there is another one.
                del lattice
                self.scorer.add(scored, missing)
                lattice = self._lattice(scored)
            # Twice what nodes that are not scored cost, since masses are rounded.
            tolerance -= 2 * self.scorer.tolerance
        loss = -lattice.log_likelihood
        finite = loss.abs() < torch.inf  # isfinite takes twice as many operations
        samples = nodes.packed.samples
        if self.zero_infinity:
            loss = loss.masked_fill(~finite, 0.0)
        self.losses.index_copy_(0, samples, loss)
        if self.weights is None or lattice.occupancy is None:
            return None

        weight = self.weights.index_select(0, samples).double()
        of_no_loss = 0.0 if self.zero_infinity else float("nan")
        weight = weight.where(finite | (weight == 0), of_no_loss)
        if not self.scorer.task.normalize:
            # Log-probabilities without a softmax have the occupancies as gradients, whose mass is
            # that of a softmax with nothing for its symbols.
            scored.scores.fill_(-torch.inf)
        return _Occupied(
            scored=scored,
            occupancy=lattice.occupancy,
            weight=weight,
            selection=backend.select_nodes(
                topology,
                nodes,
                scored.scores,
                lattice.occupancy,
                weight=weight,
                tolerance=tolerance,
                least=self.scorer.source.least_gradient,
            ),
        )

    def _lattice(self, scored: Scored) -> Lattice:
        task = self.scorer.task
        return task.backend.forward_backward(
            task.topology, scored.nodes, scored.scores, occupancies=self.weights is not None
        )

    def backward(self, occupied: _Occupied) -> None:
        """Gradients of a group."""
        scored = occupied.scored
        again, anew = scored.logits.split(occupied.selection())
        self._add_gradients(occupied, again, scored.logits.again)
        self._add_gradients(occupied, anew, lambda rows, _: scored.logits.logits(rows))
        scored.logits.finish()

    def _add_gradients(
        self, occupied: _Occupied, selected: Tensor, logits: Callable[[Rows, RowIndex], Logits]
    ) -> None:
        """Those of the selected nodes."""
        scored, task = occupied.scored, self.scorer.task
        for chunk in self.scorer.chunks(len(selected)):
            numbers = selected[chunk]
            index = numbers if len(selected) < len(scored.scores) else chunk
            rows = scored.nodes.rows.at(index)
            # Without a name, a chunk's gradient is gone before the next one's logits are computed.
            scored.logits.backward(
                rows,
                task.backend.logit_gradient_(
                    task.topology,
                    logits(rows, index),
                    scored.columns,
                    rows,
                    numbers,
                    scored.nodes,
                    scored.scores,
                    occupied.occupancy,
                    occupied.weight,
                    normalize=task.normalize,
                    clamp=self.clamp,
                    part=scored.part,
                ),
            )
