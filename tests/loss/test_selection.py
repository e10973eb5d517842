"""Gradient-mass selection: what is skipped is bounded by the tolerance, and known beforehand.

Of torch operations; ``test_kernels`` asks the same of kernels.
"""

import pytest
import torch
from problems import loss_and_gradients, random_joint, random_labels, relative_error
from torch import Tensor

import rnnt_op
from rnnt_op import reference
from rnnt_op.backends import eager
from rnnt_op.backends.records import Logits
from rnnt_op.nodes import Nodes, pack_nodes
from rnnt_op.plan import Group
from rnnt_op.topology import RNNT

LENGTHS = [(40, 13), (23, 20), (1, 5), (12, 0)]
VOCAB_SIZE = 9


def scored(scale: float) -> tuple[Nodes, Tensor, Tensor, Tensor]:
    """Nodes, scores and occupancies of a ragged group, and the L1 norm of each logit gradient.

    The norms come from float64 autograd through the batched reference.
    """
    frames, labels = max(t for t, _ in LENGTHS), max(u for _, u in LENGTHS)
    shape = (len(LENGTHS), frames, labels + 1, VOCAB_SIZE)
    logits = (torch.randn(shape, dtype=torch.float64) * scale).requires_grad_()
    targets = random_labels((len(LENGTHS), labels), VOCAB_SIZE, 0)
    lengths = torch.tensor(LENGTHS)
    loss = reference.rnnt_loss(logits, targets, lengths[:, 0], lengths[:, 1], 0, "sum")
    (gradient,) = torch.autograd.grad(loss, logits)

    nodes = pack_nodes(
        Group(
            samples=tuple(range(len(LENGTHS))),
            frames=tuple(t for t, _ in LENGTHS),
            states=tuple(u + 1 for _, u in LENGTHS),
        ),
        targets,
        eager,
    )
    packed = torch.cat(
        [x[:t, : u + 1].flatten(0, 1) for x, (t, u) in zip(logits, LENGTHS, strict=True)]
    )
    norms = torch.cat(
        [
            x[:t, : u + 1].abs().sum(-1).flatten()
            for x, (t, u) in zip(gradient, LENGTHS, strict=True)
        ]
    )
    columns = RNNT.columns(nodes.packed.next_label, 0, VOCAB_SIZE)
    scores = torch.empty(len(nodes.rows), 2, dtype=torch.float64)
    chunk = Logits(packed.detach(), None, torch.float64)
    eager.symbol_scores(RNNT, chunk, columns, nodes.rows, True, scores)
    occupancy = eager.forward_backward(RNNT, nodes, scores, occupancies=True).occupancy
    return nodes, scores, occupancy, norms


def select(nodes: Nodes, scores: Tensor, occupancy: Tensor, weight: Tensor, tolerance: float):
    return eager.select_nodes(
        RNNT, nodes, scores, occupancy, weight=weight, tolerance=tolerance, least=0.0
    )()


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 10.0])
def test_mass_is_the_l1_norm_of_the_logit_gradient(scale: float) -> None:
    _, scores, occupancy, norms = scored(scale)
    mass = eager.gradient_mass(RNNT, scores, occupancy)
    torch.testing.assert_close(mass, norms, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 10.0])
def test_occupancies_sum_to_the_length_of_a_path(scale: float) -> None:
    nodes, _, occupancy, _ = scored(scale)
    total = torch.zeros(len(LENGTHS), dtype=torch.float64)
    total.index_add_(0, nodes.sample_of(nodes.rows), occupancy.sum(1))
    expected = torch.tensor([float(t + u) for t, u in LENGTHS], dtype=torch.float64)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("tolerance", [0.5, 1e-1, 1e-3, 1e-6, 1e-9, 0.0])
def test_skipped_mass_is_bounded(scale: float, tolerance: float) -> None:
    nodes, scores, occupancy, norms = scored(scale)
    weight = torch.ones(len(LENGTHS), dtype=torch.float64)
    kept = select(nodes, scores, occupancy, weight, tolerance)
    assert (kept.diff() > 0).all()
    is_kept = torch.zeros(len(norms), dtype=torch.bool)
    is_kept[kept] = True
    for s in range(len(LENGTHS)):
        mine = nodes.sample_of(nodes.rows) == s
        skipped, total = norms[mine & ~is_kept], norms[mine].sum()
        assert skipped.sum() <= tolerance * total * (1 + 1e-9) + 1e-15
        if len(skipped):
            # No node of twice the mass of a kept one is skipped: the cut is at a quarter octave.
            assert skipped.max() <= norms[mine & is_kept].min() * 1.25


def test_a_larger_tolerance_skips_more() -> None:
    nodes, scores, occupancy, _ = scored(1.0)
    weight = torch.ones(len(LENGTHS), dtype=torch.float64)
    counts = [
        len(select(nodes, scores, occupancy, weight, tolerance))
        for tolerance in (0.0, 1e-9, 1e-6, 1e-3, 1e-1)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0] / 2


def test_dead_samples_keep_no_node() -> None:
    nodes, scores, occupancy, _ = scored(1.0)
    weight = torch.tensor([1.0, 0.0, -2.0, -0.0], dtype=torch.float64)
    kept = select(nodes, scores, occupancy, weight, 1e-6)
    assert set(nodes.sample_of(nodes.rows)[kept].tolist()) == {0, 2}


@pytest.mark.every_backend("emulator")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_default_tolerance_is_within_rounding(dtype: torch.dtype, scale: float) -> None:
    problem = random_joint(2, 60, 20, joint_dim=16, vocab_size=30, dtype=dtype, scale=scale)
    _, everything = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, gradient_tolerance=0.0)
    _, default = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    assert relative_error(default, everything) <= 4 * torch.finfo(dtype).eps


@pytest.mark.every_backend("emulator")
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_gradient_error_follows_the_tolerance(tolerance: float) -> None:
    problem = random_joint(2, 60, 20, joint_dim=16, vocab_size=30)
    _, everything = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, gradient_tolerance=0.0)
    _, selected = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, gradient_tolerance=tolerance)
    assert 0 < relative_error(selected, everything) <= 5 * tolerance
