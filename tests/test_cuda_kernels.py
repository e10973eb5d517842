"""Each CUDA kernel against float64: in the emulator, and on a GPU if there is one.

In the emulator, operands end at a guard page and padding holds NaN, so that a stray access is an
error and a stray value shows.
"""

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from problems import enumerated_loss, random_labels
from torch import Tensor

from rnnt_op.backends import eager
from rnnt_op.backends.cuda import CudaBackend, cuda_backend
from rnnt_op.backends.protocol import JointSums, Logits
from rnnt_op.nodes import Nodes, aligned, pack_nodes
from rnnt_op.plan import Group
from rnnt_op.reference import activate
from rnnt_op.topology import RNNT, Arc, Topology

NAN = float("nan")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["tanh", "relu", "sigmoid", "identity"]
RAGGED = [(7, 4), (1, 0), (1, 9), (12, 0), (9, 13)]


@dataclass(frozen=True)
class Cuda:
    backend: CudaBackend
    device: torch.device
    guard: Callable[[Tensor], Tensor]  # moves a tensor to where stray accesses are caught

    def rows(self, values: Tensor) -> Tensor:
        """A matrix with padded rows. [R, C]"""
        padded = torch.full((len(values), aligned(values.shape[1])), NAN, dtype=values.dtype)
        padded[:, : values.shape[1]] = values
        return self.guard(padded)[:, : values.shape[1]]

    def nodes(self, lengths: Sequence[tuple[int, int]], vocab_size: int = 11) -> Nodes:
        """Nodes of a group of samples with some (T, U)."""
        targets = random_labels((len(lengths), max(u for _, u in lengths)), vocab_size, 0)
        return pack_nodes(group(lengths), targets.to(self.device), self.backend)


@pytest.fixture(
    params=[
        pytest.param(
            "emulator",
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
        ),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ]
)
def cuda(request: pytest.FixtureRequest) -> Cuda:
    if request.param == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        return Cuda(cuda_backend(device), device, lambda tensor: tensor.to(device))
    from emulated import emulated_backend
    from emulator.memory import guarded

    return Cuda(emulated_backend(), torch.device("cpu"), guarded)


def group(lengths: Sequence[tuple[int, int]]) -> Group:
    return Group(
        tuple(range(len(lengths))),
        tuple(t for t, _ in lengths),
        tuple(u + 1 for _, u in lengths),
    )


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def test_node_rows(cuda: Cuda) -> None:
    nodes = cuda.nodes(RAGGED)
    expected = [
        (sum(t for t, _ in RAGGED[:s]) + t, sum(u + 1 for _, u in RAGGED[:s]) + u)
        for s, (frames, labels) in enumerate(RAGGED)
        for t in range(frames)
        for u in range(labels + 1)
    ]
    assert nodes.rows.frame.dtype == nodes.rows.state.dtype == torch.int32
    assert list(zip(nodes.rows.frame.tolist(), nodes.rows.state.tolist(), strict=True)) == expected


@pytest.mark.parametrize("joint_dim", [1, 8, 129, 640])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide_states", [False, True])
def test_hidden(
    cuda: Cuda, dtype: torch.dtype, activation: str, joint_dim: int, wide_states: bool
) -> None:
    """Through an identity as output layer, logits are the hidden states."""
    input_dtype = torch.promote_types(dtype, torch.float32) if wide_states else dtype
    nodes = cuda.nodes([(3, 2), (2, 0), (1, 4)])
    states = nodes.packed
    encoder = torch.randn(len(states.frame_sample), joint_dim, device=cuda.device).to(input_dtype)
    predictor = torch.randn(len(states.state_sample), joint_dim, device=cuda.device).to(input_dtype)
    chunk = cuda.backend.joint_chunk(
        torch.eye(joint_dim, dtype=dtype, device=cuda.device),
        None,
        activation=activation,
        input_dtype=input_dtype,
        compute_dtype=dtype,
    )
    chunk.allocate(len(nodes.rows))
    hidden = chunk.logits(cuda.rows(encoder), cuda.rows(predictor), nodes.rows).values

    rows = nodes.rows
    sums = encoder.double()[rows.frame.long()] + predictor.double()[rows.state.long()]
    expected = activate(sums, activation)
    # Rounded once to the operand; the instruction for bfloat16's tanh adds 2^-11.
    is_approximate = dtype == torch.bfloat16 and activation == "tanh"
    allowed = rounding(dtype) / 2 + (2**-11 if is_approximate else 0)
    real = torch.promote_types(dtype, torch.float32)
    allowed += 4 * rounding(real) * (1 + sums.abs())  # of the sum, and of the function
    assert ((hidden.double() - expected).abs() <= allowed * expected.abs() + 1e-30).all()


@pytest.mark.parametrize("joint_dim", [1, 8, 129, 640])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_gradient(cuda: Cuda, dtype: torch.dtype, activation: str, joint_dim: int) -> None:
    """Sums over the rows of a frame, and over those of a state, add to what is there already."""
    real = torch.promote_types(dtype, torch.float32)
    nodes = cuda.nodes([(6, 5), (4, 0), (1, 9)])
    encoder = torch.randn(len(nodes.packed.frame_sample), joint_dim, device=cuda.device).to(dtype)
    predictor = torch.randn(len(nodes.packed.state_sample), joint_dim, device=cuda.device).to(dtype)
    kept = torch.randperm(len(nodes.rows), device=cuda.device)[: len(nodes.rows) * 2 // 3]
    rows = nodes.rows.select(kept.sort().values)
    chunk = cuda.backend.joint_chunk(
        torch.eye(joint_dim, dtype=dtype, device=cuda.device),
        None,
        activation=activation,
        input_dtype=dtype,
        compute_dtype=dtype,
    )
    chunk.allocate(len(rows))
    encoder_sums, predictor_sums = torch.randn_like(encoder), torch.randn_like(predictor)
    sums = JointSums(
        cuda.rows(encoder_sums.to(real)), cuda.rows(predictor_sums.to(real)), None, None
    )
    hidden = chunk.logits(cuda.rows(encoder), cuda.rows(predictor), rows).values.double()
    d_logits = torch.randn(len(rows), joint_dim, device=cuda.device).to(dtype)
    chunk.backward(rows, d_logits, sums)

    derivative = {
        "tanh": 1 - hidden**2,
        "relu": (hidden > 0).double(),
        "sigmoid": hidden * (1 - hidden),
        "identity": torch.ones_like(hidden),
    }[activation]
    d_sum = d_logits.double() * derivative
    for actual, initial, segment in (
        (sums.encoder_rows, encoder_sums, rows.frame),
        (sums.predictor_rows, predictor_sums, rows.state),
    ):
        expected = initial.double().index_add(0, segment.long(), d_sum)
        # 1 − y² and y·(1 − y) round at the size of 1, whatever they are.
        magnitude = initial.double().abs().index_add(0, segment.long(), d_logits.double().abs())
        allowed = 4 * rounding(real) * magnitude
        assert actual is not None
        assert ((actual.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("vocab_size", [1, 2, 31, 128, 257, 513, 1030])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("has_bias", [False, True])
def test_arc_scores(cuda: Cuda, dtype: torch.dtype, vocab_size: int, has_bias: bool) -> None:
    nodes = cuda.nodes([(4, 3), (1, 0), (3, 1)], max(2, vocab_size))
    columns = RNNT.columns(nodes.packed.next_label, 0)
    if vocab_size == 1:
        columns[:, 1] = -1
    x = torch.randn(len(nodes.rows), vocab_size, dtype=dtype, device=cuda.device) * 5
    bias = torch.randn(1, vocab_size, dtype=dtype, device=cuda.device) if has_bias else None
    if vocab_size > 30:
        x[:, 7] = -torch.inf  # a forbidden token
    total = (x if bias is None else x + bias).double()
    row_columns = columns[nodes.rows.state.long()]
    picked = total.log_softmax(1).gather(1, row_columns.clamp(min=0))
    expected = picked.masked_fill(row_columns < 0, -torch.inf)

    logits = Logits(cuda.rows(x), None if bias is None else cuda.rows(bias)[0], dtype)
    scores = cuda.guard(torch.full((len(nodes.rows), 2), NAN, dtype=torch.float64))
    cuda.backend.arc_scores(logits, columns, nodes.rows, True, scores)
    torch.testing.assert_close(scores, expected, rtol=8 * rounding(dtype), atol=8 * rounding(dtype))

    raw = Logits(cuda.rows(x), None, dtype)
    cuda.backend.arc_scores(raw, columns, nodes.rows, False, scores)
    picked = x.double().gather(1, row_columns.clamp(min=0))
    torch.testing.assert_close(scores, picked.masked_fill(row_columns < 0, -torch.inf))


def test_arc_scores_of_an_almost_certain_arc(cuda: Cuda) -> None:
    """log p rounds as float64 does at 1, however small it is; float32 would give 0."""
    nodes = cuda.nodes([(3, 2)], 100)
    columns = RNNT.columns(nodes.packed.next_label, 0)
    x = torch.randn(len(nodes.rows), 100, device=cuda.device)
    x[:, 0] += 30
    scores = cuda.guard(torch.full((len(nodes.rows), 2), NAN, dtype=torch.float64))
    cuda.backend.arc_scores(
        Logits(cuda.rows(x), None, torch.float32), columns, nodes.rows, True, scores
    )
    expected = -(x.double()[:, 1:] - x.double()[:, :1]).exp().sum(1).log1p()
    # Float32 differences of logits round at their size, 30.
    torch.testing.assert_close(scores[:, 0], expected, rtol=4e-6, atol=2**-52)
    assert expected.abs().max() < 1e-9


def test_arc_scores_that_are_not_numbers(cuda: Cuda) -> None:
    """NaN, +∞, and a row of −∞ alone give NaN, in their row only."""
    nodes = cuda.nodes([(4, 1)], 40)
    columns = RNNT.columns(nodes.packed.next_label, 0)
    x = torch.randn(len(nodes.rows), 40, device=cuda.device)
    x[1, 30], x[3, 5], x[5] = NAN, torch.inf, -torch.inf
    scores = cuda.guard(torch.zeros(len(nodes.rows), 2, dtype=torch.float64))
    cuda.backend.arc_scores(
        Logits(cuda.rows(x), None, torch.float32), columns, nodes.rows, True, scores
    )
    assert scores[:, 0].isnan().nonzero().flatten().tolist() == [1, 3, 5]


def random_scores(cuda: Cuda, nodes: Nodes, topology: Topology) -> Tensor:
    """Log-probabilities of arcs, −∞ where a label arc leaves the last state. [N, A]"""
    arcs = topology.arcs
    shape = (len(nodes.rows), len(arcs) + 1)
    scores = torch.randn(shape, dtype=torch.float64, device=cuda.device).mul(3).log_softmax(1)
    labels_left = nodes.packed.states[nodes.packed.state_sample] - 1 - nodes.packed.state_index
    for a, arc in enumerate(arcs):
        missing = labels_left[nodes.rows.state.long()] < arc.labels
        scores[:, a].masked_fill_(missing, -torch.inf)
    return cuda.guard(scores[:, : len(arcs)].contiguous())


def test_log_likelihood_of_enumerated_paths(cuda: Cuda) -> None:
    for frames, labels in itertools.product([1, 2, 4], [0, 1, 3]):
        nodes = cuda.nodes([(frames, labels)])
        scores = random_scores(cuda, nodes, RNNT)
        lattice = cuda.backend.forward_backward(RNNT, nodes, scores, occupancies=False)
        assert lattice.occupancy is None
        # As log-probabilities of a vocabulary of blank and label.
        log_probs = scores.view(frames, labels + 1, 2).cpu()
        expected = -enumerated_loss(log_probs, [1] * labels, 0)
        torch.testing.assert_close(
            lattice.log_likelihood[0].cpu(), expected, rtol=1e-13, atol=1e-13
        )


TOPOLOGIES = {
    "rnnt": RNNT,
    "label-reads-a-frame": Topology((Arc(1, 0, "blank"), Arc(1, 1, "label"))),
    "big-blanks": Topology(
        (Arc(1, 0, "blank"), Arc(2, 0, "blank"), Arc(4, 0, "blank"), Arc(0, 1, "label"))
    ),
}
LATTICES = {
    "ragged": RAGGED,
    "one-frame": [(1, 0)],
    "one-frame-many-labels": [(1, 1500)],
    "more-labels-than-threads": [(3, 1100), (5, 40)],
    "more-labels-than-shared-memory": [(2, 6200)],
    "long": [(300, 30)],
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("lengths", LATTICES)
def test_lattice(cuda: Cuda, topology: str, lengths: str) -> None:
    """Against the anti-diagonal recursion in torch operations, which the CPU suite proves."""
    arcs, sizes = TOPOLOGIES[topology], LATTICES[lengths]
    nodes = cuda.nodes(sizes)
    scores = random_scores(cuda, nodes, arcs)
    lattice = cuda.backend.forward_backward(arcs, nodes, scores, occupancies=True)
    host = pack_nodes(group(sizes), torch.zeros(len(sizes), max(u for _, u in sizes)).long(), eager)
    expected = eager.forward_backward(arcs, host, scores.cpu(), occupancies=True)
    assert lattice.occupancy is not None
    assert expected.occupancy is not None
    feasible = expected.log_likelihood.isfinite()
    assert topology == "label-reads-a-frame" or feasible.all()
    torch.testing.assert_close(
        lattice.log_likelihood.cpu(), expected.log_likelihood, rtol=1e-12, atol=1e-12
    )
    is_feasible = feasible[host.sample_of(host.rows)]
    torch.testing.assert_close(
        lattice.occupancy.cpu()[is_feasible],
        expected.occupancy[is_feasible],
        rtol=1e-9,
        atol=1e-13,
    )
    if topology == "rnnt":
        total = torch.zeros(len(sizes), dtype=torch.float64)
        total.index_add_(0, host.sample_of(host.rows), lattice.occupancy.cpu().sum(1))
        path = torch.tensor([float(t + u) for t, u in sizes], dtype=torch.float64)
        torch.testing.assert_close(total, path, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1e4, 1e12, 1e35])
def test_lattice_of_any_magnitude(cuda: Cuda, scale: float) -> None:
    """Probabilities that no float64 holds, and arcs that rule each other out."""
    sizes = [(30, 12), (1, 3), (9, 0)]
    nodes = cuda.nodes(sizes)
    scores = cuda.guard(random_scores(cuda, nodes, RNNT) * scale)
    lattice = cuda.backend.forward_backward(RNNT, nodes, scores, occupancies=True)
    host = pack_nodes(group(sizes), torch.zeros(3, 12).long(), eager)
    expected = eager.forward_backward(RNNT, host, scores.cpu(), occupancies=True)
    torch.testing.assert_close(
        lattice.log_likelihood.cpu(), expected.log_likelihood, rtol=1e-13, atol=1e-13
    )
    if scale < 1e5:  # beyond, logarithms round by more than an occupancy can change
        rounding = float(expected.log_likelihood.abs().max()) * 2**-48
        assert lattice.occupancy is not None
        torch.testing.assert_close(
            lattice.occupancy.cpu(), expected.occupancy, rtol=1e-12 + rounding, atol=1e-13
        )


@pytest.mark.parametrize("forbidden", [-torch.inf, torch.finfo(torch.float32).min])
def test_lattice_with_forbidden_arcs(cuda: Cuda, forbidden: float) -> None:
    """−∞ closes a path; where all are closed the likelihood is 0, and NaN stays NaN."""
    sizes = [(4, 2), (4, 2), (4, 2)]
    nodes = cuda.nodes(sizes)
    scores = random_scores(cuda, nodes, RNNT).view(3, 4, 3, 2)
    scores[0, 1, 1, 0] = scores[0, 2, 0, 1] = forbidden
    scores[1, :, 0, 1] = -torch.inf
    scores[2, 0, 0, 0] = NAN
    scores = cuda.guard(scores.view(-1, 2).clone())
    lattice = cuda.backend.forward_backward(RNNT, nodes, scores, occupancies=True)
    host = pack_nodes(group(sizes), torch.zeros(3, 2).long(), eager)
    expected = eager.forward_backward(RNNT, host, scores.cpu(), occupancies=True)
    torch.testing.assert_close(
        lattice.log_likelihood.cpu(), expected.log_likelihood, equal_nan=True
    )
    assert lattice.log_likelihood[1] == -torch.inf
    assert lattice.log_likelihood[2].isnan()
    assert lattice.occupancy is not None
    torch.testing.assert_close(lattice.occupancy[:12].cpu(), expected.occupancy[:12])


@dataclass(frozen=True)
class Scored:
    nodes: Nodes
    columns: Tensor
    logits: Tensor  # float64. [N, V]
    scores: Tensor
    occupancy: Tensor


def scored(
    cuda: Cuda,
    lengths: Sequence[tuple[int, int]],
    *,
    vocab_size: int,
    scale: float,
    no_blank: Sequence[int] = (),
) -> Scored:
    """A random problem; some nodes must not emit blank."""
    nodes = cuda.nodes(lengths, vocab_size)
    columns = RNNT.columns(nodes.packed.next_label, 0)
    logits = torch.randn(len(nodes.rows), vocab_size, device=cuda.device).double() * scale
    logits[list(no_blank), 0] = -torch.inf
    row_columns = columns[nodes.rows.state.long()]
    scores = logits.log_softmax(1).gather(1, row_columns.clamp(min=0))
    scores = cuda.guard(scores.masked_fill(row_columns < 0, -torch.inf))
    occupancy = cuda.backend.forward_backward(RNNT, nodes, scores, occupancies=True).occupancy
    assert occupancy is not None
    return Scored(nodes, columns, logits, scores, occupancy)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("tolerance", [0.5, 1e-3, 1e-6, 1e-9, 0.0])
def test_selection(cuda: Cuda, scale: float, tolerance: float) -> None:
    """What is skipped is bounded, in every sample; whose loss is bad, or unwanted, is another's."""
    problem = scored(cuda, [*RAGGED, (40, 20), (30, 31)], vocab_size=9, scale=scale)
    nodes, samples = problem.nodes, len(RAGGED) + 2
    sample = nodes.sample_of(nodes.rows)
    live = torch.ones(samples, dtype=torch.bool, device=cuda.device)
    live[1] = live[2] = False
    poisoned = torch.zeros_like(live)
    poisoned[2] = True
    kept = cuda.backend.select_nodes(
        nodes,
        problem.scores,
        cuda.guard(problem.occupancy.clone()),
        live=cuda.guard(live.clone()),
        poisoned=cuda.guard(poisoned.clone()),
        tolerance=tolerance,
    )()
    assert kept.dtype == torch.int64
    assert (kept.diff() > 0).all()
    is_kept = torch.zeros(len(nodes.rows), dtype=torch.bool, device=cuda.device)
    is_kept[kept] = True
    assert not is_kept[sample == 1].any()
    assert is_kept[sample == 2].all()

    gamma = problem.occupancy.sum(1, keepdim=True)
    gradient = gamma * problem.logits.softmax(1)
    row_columns = problem.columns[nodes.rows.state.long()].clamp(min=0)
    mass = gradient.scatter_add(1, row_columns, -problem.occupancy).abs().sum(1)
    for s in set(range(samples)) - {1, 2}:
        mine = sample == s
        skipped, total = mass[mine & ~is_kept], mass[mine].sum()
        assert skipped.sum() <= tolerance * total * (1 + 1e-9) + 1e-13
        if len(skipped):
            assert skipped.max() <= mass[mine & is_kept].min() * 1.25
    if tolerance == 0.5 and scale > 0:
        assert len(kept) < len(nodes.rows) / 2


def test_selection_of_many_nodes(cuda: Cuda) -> None:
    """More blocks than one; every node of positive mass is kept at tolerance zero, in order."""
    problem = scored(cuda, [(60, 50), (1, 0), (45, 77)], vocab_size=3, scale=1.0)
    live = torch.ones(3, dtype=torch.bool, device=cuda.device)
    kept = cuda.backend.select_nodes(
        problem.nodes,
        problem.scores,
        problem.occupancy,
        live=live,
        poisoned=~live,
        tolerance=0.0,
    )()
    mass = eager.gradient_mass(problem.scores, problem.occupancy)
    torch.testing.assert_close(kept, mass.nonzero().flatten())


@pytest.mark.parametrize("vocab_size", [2, 31, 128, 257, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("clamp", [0.0, 0.01])
def test_logit_gradient(
    cuda: Cuda, dtype: torch.dtype, vocab_size: int, has_bias: bool, clamp: float
) -> None:
    real = torch.promote_types(dtype, torch.float32)
    problem = scored(cuda, [(5, 3), (1, 0), (2, 6)], vocab_size=vocab_size, scale=2.0)
    nodes, n = problem.nodes, len(problem.nodes.rows)
    kept = torch.randperm(n, device=cuda.device)[: n * 2 // 3].sort().values
    rows = nodes.rows.select(kept)
    weight = torch.tensor([0.5, -2.0, NAN], dtype=torch.float64, device=cuda.device)
    bias = torch.randn(1, vocab_size, device=cuda.device) if has_bias else None
    x = problem.logits[kept] - (0 if bias is None else bias)
    chunk = Logits(
        cuda.rows(x.to(real)), None if bias is None else cuda.rows(bias.to(real))[0], dtype
    )
    actual = cuda.backend.logit_gradient_(
        chunk,
        problem.columns,
        rows,
        cuda.guard(kept.clone()),
        nodes,
        problem.scores,
        problem.occupancy,
        cuda.guard(weight.clone()),
        normalize=True,
        clamp=clamp,
    )
    assert actual.dtype == dtype
    assert actual.shape == (len(kept), vocab_size)
    assert actual.data_ptr() == chunk.values.data_ptr()

    occupancy = problem.occupancy[kept]
    softmax = problem.logits[kept].softmax(1)
    gamma = occupancy.sum(1, keepdim=True)
    columns = problem.columns[rows.state.long()].clamp(min=0)
    expected = (gamma * softmax).scatter_add(1, columns, -occupancy)
    if clamp > 0:
        expected = expected.clamp(-clamp, clamp)
    expected *= weight[nodes.sample_of(rows)].unsqueeze(1)
    smallest = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=rounding(dtype) + 32 * rounding(real),
        atol=max(smallest, 4e-8 if real == torch.float32 else 1e-16),
        equal_nan=True,
    )
    assert actual[nodes.sample_of(rows) == 2].isnan().all()
    assert not actual[nodes.sample_of(rows) != 2].isnan().any()


def test_logit_gradient_without_blank(cuda: Cuda) -> None:
    """The normaliser comes from an arc that is possible."""
    problem = scored(cuda, [(5, 3)], vocab_size=9, scale=1.0, no_blank=[0, 5])
    actual = cuda.backend.logit_gradient_(
        Logits(cuda.rows(problem.logits), None, torch.float64),
        problem.columns,
        problem.nodes.rows,
        torch.arange(len(problem.logits), device=cuda.device),
        problem.nodes,
        problem.scores,
        problem.occupancy,
        torch.ones(1, dtype=torch.float64, device=cuda.device),
        normalize=True,
        clamp=-1.0,
    )
    columns = problem.columns[problem.nodes.rows.state.long()].clamp(min=0)
    expected = problem.occupancy.sum(1, keepdim=True) * problem.logits.softmax(1)
    expected.scatter_add_(1, columns, -problem.occupancy)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


def test_logit_gradient_of_large_logits(cuda: Cuda) -> None:
    """The normaliser is as exact as differences of logits, however large both are."""
    problem = scored(cuda, [(5, 3)], vocab_size=70, scale=2.0)
    # Multiples of 2^-10 near 2^13 are float32 numbers.
    logits = problem.logits.mul(2**10).round() / 2**10 + 5000
    columns = problem.columns[problem.nodes.rows.state.long()]
    scores = logits.log_softmax(1).gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1e300)
    actual = cuda.backend.logit_gradient_(
        Logits(cuda.rows(logits.float()), None, torch.float32),
        problem.columns,
        problem.nodes.rows,
        torch.arange(len(logits), device=cuda.device),
        problem.nodes,
        scores,
        problem.occupancy,
        torch.ones(1, dtype=torch.float64, device=cuda.device),
        normalize=True,
        clamp=-1.0,
    )
    gamma = problem.occupancy.sum(1, keepdim=True)
    expected = gamma * logits.softmax(1)
    expected.scatter_add_(1, columns.clamp(min=0), -problem.occupancy)
    torch.testing.assert_close(actual.double(), expected, rtol=4e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logit_gradient_of_log_probabilities(cuda: Cuda, dtype: torch.dtype) -> None:
    problem = scored(cuda, [(5, 3), (2, 6)], vocab_size=20, scale=1.0)
    real = torch.promote_types(dtype, torch.float32)
    kept = torch.arange(len(problem.nodes.rows), device=cuda.device)
    weight = torch.ones(2, dtype=torch.float64, device=cuda.device)
    actual = cuda.backend.logit_gradient_(
        Logits(cuda.rows(problem.logits.to(real)), None, dtype),
        problem.columns,
        problem.nodes.rows,
        kept,
        problem.nodes,
        problem.scores,
        problem.occupancy,
        weight,
        normalize=False,
        clamp=-1.0,
    )
    columns = problem.columns[problem.nodes.rows.state.long()].clamp(min=0)
    expected = torch.zeros_like(problem.logits).scatter_add(1, columns, -problem.occupancy)
    torch.testing.assert_close(actual, expected.to(dtype), rtol=rounding(dtype), atol=0)
