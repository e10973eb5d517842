"""Each kernel against float64: natively, in the CUDA emulator, and on a GPU if there is one.

On the CPU, operands end at a guard page and padding holds NaN, so that a stray access is an error
and a stray value shows.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from path_sums import all_nodes, sum_over_paths
from problems import random_labels
from tested_backends import CUDA, EAGER, EMULATOR, NATIVE, cpu_backend
from torch import Tensor

from rnnt_op import topologies
from rnnt_op.activations import ACTIVATIONS, activate
from rnnt_op.backends import backend_for, eager
from rnnt_op.backends.cuda import CudaBackend
from rnnt_op.backends.lattice_walk import Walk
from rnnt_op.backends.protocol import Backend
from rnnt_op.backends.records import JointStates, JointSums, Logits, least_gradient
from rnnt_op.nodes import Nodes, aligned, pack_nodes
from rnnt_op.plan import Group
from rnnt_op.topology import NO_LABEL, RNNT, ZERO_LOGIT, Topology

NAN = float("nan")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RAGGED = [(7, 4), (1, 0), (1, 9), (12, 0), (9, 13)]
FEASIBLE = [(7, 4), (1, 0), (3, 2), (12, 0), (13, 9)]  # for every topology
TOPOLOGIES = {
    "rnnt": RNNT,
    "modified": topologies.modified(),
    "constrained": topologies.constrained(),
    "multi-blank": topologies.multi_blank((2, 4), columns=(-1, -2), sigma=0.05),
    "tdt": topologies.tdt((0, 1, 2, 3), sigma=0.05),
    "hat": topologies.hat(),
    "hat-constrained": topologies.hat(topologies.constrained()),
}
# Offsets, delays and scales are numbers that a kernel is given, so two lattices show that it can do
# without.
REGULARIZED = [*((topology, True) for topology in TOPOLOGIES), ("rnnt", False), ("tdt", False)]
AT_MOST_ONE_LABEL_A_FRAME = {"modified", "constrained", "hat-constrained"}


@dataclass(frozen=True)
class Kernels:
    name: str  # of the backend
    backend: Backend
    device: torch.device
    guard: Callable[[Tensor], Tensor]  # moves a tensor to where stray accesses are caught

    def rows(self, values: Tensor) -> Tensor:
        """A matrix with padded rows. [R, C]"""
        padded = torch.full((len(values), aligned(values.shape[1])), NAN, dtype=values.dtype)
        padded[:, : values.shape[1]] = values
        return self.guard(padded)[:, : values.shape[1]]

    def joint_rows(self, values: Tensor, compute_dtype: torch.dtype) -> Tensor:
        """Packed states, or the sums of their gradient, as a chunk of the joint has them. [M, H]"""
        if self.name != "native":
            return self.rows(values)
        return self.guard(values.to(torch.promote_types(compute_dtype, torch.float32)))

    def nodes(
        self,
        lengths: Sequence[tuple[int, int]],
        vocab_size: int = 11,
        topology: Topology = RNNT,
    ) -> Nodes:
        """Nodes of a group of samples with some (T, U)."""
        # Further blanks are the last tokens.
        labels = topology.tokens(vocab_size) - len(topology.blanks(0, vocab_size)) + 1
        targets = random_labels((len(lengths), max(u for _, u in lengths)), labels, 0)
        return pack_nodes(group(lengths), targets.to(self.device), self.backend)


KERNELS = [NATIVE, EMULATOR, CUDA]
OF_A_LATTICE = pytest.mark.parametrize("kernels", [*KERNELS, EAGER], indirect=True)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    name = request.param
    if name == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        return Kernels(name, backend_for(device), device, lambda tensor: tensor.to(device))
    from emulator.memory import guarded

    guard: Callable[[Tensor], Tensor] = guarded
    if name in ("native", "eager"):
        # Unlike a GPU's, its accesses need no alignment that could hide a stray one.
        guard = lambda tensor: guarded(tensor, alignment=tensor.element_size())  # noqa: E731
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        guard = torch.clone  # which guards what it allocates, on both sides
    return Kernels(name, cpu_backend(name), torch.device("cpu"), guard)


def logits_cases(native: Sequence[torch.dtype], cuda: Sequence[torch.dtype]) -> list[Any]:
    """Backend, dtype, and whether there is a bias."""
    cases = [
        *itertools.product([NATIVE], native, [False, True]),
        *itertools.product([EAGER], DTYPES[:2], [False, True]),
        *itertools.product([EMULATOR, CUDA], cuda, [False, True]),
    ]
    return [
        pytest.param(
            backend.id,
            dtype,
            has_bias,
            marks=backend.marks,
            id=f"{backend.id}-{dtype}{'-bias' * has_bias}".replace("torch.", ""),
        )
        for backend, dtype, has_bias in cases
    ]


def group(lengths: Sequence[tuple[int, int]]) -> Group:
    return Group(
        tuple(range(len(lengths))),
        tuple(t for t, _ in lengths),
        tuple(u + 1 for _, u in lengths),
    )


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def test_node_rows(kernels: Kernels) -> None:
    nodes = kernels.nodes(RAGGED)
    expected = [
        (sum(t for t, _ in RAGGED[:s]) + t, sum(u + 1 for _, u in RAGGED[:s]) + u)
        for s, (frames, labels) in enumerate(RAGGED)
        for t in range(frames)
        for u in range(labels + 1)
    ]
    assert nodes.rows.frame.dtype == nodes.rows.state.dtype == torch.int32
    assert list(zip(nodes.rows.frame.tolist(), nodes.rows.state.tolist(), strict=True)) == expected


def activation_cases(dtypes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Dtype, activation and joint dimension: of the second half of the activations every other
    dtype, since ``test_dropout`` has the rest."""
    return [
        (dtype, activation, joint_dim)
        for i, dtype in enumerate(dtypes)
        for n, activation in enumerate(ACTIVATIONS)
        if n < len(ACTIVATIONS) // 2 or (i + n) % 2
        for joint_dim in ((1, 129), (8, 640))[i % 2]
    ]


@pytest.mark.parametrize(
    ("dtype_and_width", "activation", "joint_dim"),
    # Wider states than float32's there are not.
    activation_cases(
        [*((dtype, False) for dtype in DTYPES), *((dtype, True) for dtype in DTYPES[2:])]
    ),
)
def test_hidden(
    kernels: Kernels, dtype_and_width: tuple[torch.dtype, bool], activation: str, joint_dim: int
) -> None:
    """Through an identity as output layer, logits are the hidden states."""
    dtype, wide_states = dtype_and_width
    input_dtype = torch.promote_types(dtype, torch.float32) if wide_states else dtype
    nodes = kernels.nodes([(3, 2), (2, 0), (1, 4)])
    states = nodes.packed
    encoder = torch.randn(len(states.frame_sample), joint_dim, device=kernels.device).to(
        input_dtype
    )
    predictor = torch.randn(len(states.state_sample), joint_dim, device=kernels.device).to(
        input_dtype
    )
    chunk = kernels.backend.joint_chunk(
        torch.eye(joint_dim, dtype=dtype, device=kernels.device),
        None,
        activation=activation,
        input_dtype=input_dtype,
        compute_dtype=dtype,
    )
    chunk.allocate(len(nodes.rows))
    joint_states = JointStates(
        nodes.packed,
        kernels.joint_rows(encoder, dtype),
        kernels.joint_rows(predictor, dtype),
        JointSums(None, None, None, None),
    )
    hidden = chunk.logits(joint_states, nodes.rows).values

    rows = nodes.rows
    sums = encoder.double()[rows.frame.long()] + predictor.double()[rows.state.long()]
    expected = activate(sums, activation)
    # Rounded once to the operand; the instruction for bfloat16's tanh adds 2^-11.
    is_approximate = dtype == torch.bfloat16 and activation == "tanh"
    allowed = rounding(dtype) / 2 + (2**-11 if is_approximate else 0)
    real = torch.promote_types(dtype, torch.float32)
    allowed += 4 * rounding(real) * (1 + sums.abs())  # of the sum, and of the function
    # torch's gelu in float64 is exact to the size of its argument.
    size = sums.abs() if activation == "gelu" else expected.abs()
    least = torch.finfo(dtype).smallest_normal * rounding(dtype)
    assert ((hidden.double() - expected).abs() <= allowed * size + least).all()


@pytest.mark.parametrize(("dtype", "activation", "joint_dim"), activation_cases(DTYPES))
def test_joint_gradient(
    kernels: Kernels, dtype: torch.dtype, activation: str, joint_dim: int
) -> None:
    """Sums over the rows of a frame, and over those of a state, add to what is there already."""
    nodes = kernels.nodes([(6, 5), (4, 0), (1, 9)])
    kept = torch.randperm(len(nodes.rows), device=kernels.device)[: len(nodes.rows) * 2 // 3]
    check_joint_gradient(kernels, nodes, kept.sort().values, dtype, activation, joint_dim)


# On a GPU, another warp for each 64 rows that a frame or state may have, and 512 looked at by each at once.
MANY_ROWS = {
    "one-warp": ([(3, 100), (100, 5), (0, 4), (1, 1)], slice(None)),
    "frames-by-several": ([(2, 20), (4, 330), (2, 3)], slice(None)),
    "states-by-several": ([(2, 20), (130, 9), (2, 3)], slice(None)),
    "states-by-most": ([(1100, 1)], slice(None)),
    # A chunk begins and ends within samples, whose other rows are other chunks'.
    "of-a-chunk": ([(5, 3), (300, 5), (2, 7), (250, 1)], slice(500, 2100)),
    "of-one-frame": ([(5, 3), (3, 200)], slice(100, 190)),
}


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("case", MANY_ROWS)
def test_joint_gradient_of_many_rows(kernels: Kernels, case: str, share: float) -> None:
    lengths, chunk = MANY_ROWS[case]
    nodes = kernels.nodes(lengths)
    kept = torch.rand(len(nodes.rows), device=kernels.device) < share
    numbers = torch.arange(len(nodes.rows), device=kernels.device)[chunk]
    check_joint_gradient(kernels, nodes, numbers[kept[chunk]], torch.float64, "tanh", 3)


def check_joint_gradient(
    kernels: Kernels,
    nodes: Nodes,
    kept: Tensor,
    dtype: torch.dtype,
    activation: str,
    joint_dim: int,
) -> None:
    real = torch.promote_types(dtype, torch.float32)
    encoder = torch.randn(len(nodes.packed.frame_sample), joint_dim, device=kernels.device).to(
        dtype
    )
    predictor = torch.randn(len(nodes.packed.state_sample), joint_dim, device=kernels.device).to(
        dtype
    )
    rows = nodes.rows.at(kept)
    chunk = kernels.backend.joint_chunk(
        torch.eye(joint_dim, dtype=dtype, device=kernels.device),
        None,
        activation=activation,
        input_dtype=dtype,
        compute_dtype=dtype,
    )
    chunk.allocate(len(rows))
    encoder_sums, predictor_sums = torch.randn_like(encoder), torch.randn_like(predictor)
    sums = JointSums(
        kernels.joint_rows(encoder_sums.to(real), dtype),
        kernels.joint_rows(predictor_sums.to(real), dtype),
        None,
        None,
    )
    states = JointStates(
        nodes.packed, kernels.joint_rows(encoder, dtype), kernels.joint_rows(predictor, dtype), sums
    )
    logits = chunk.logits(states, rows)
    hidden = logits.values.double()
    d_logits = torch.randn(len(rows), joint_dim, device=kernels.device).to(dtype)
    chunk.backward(states, rows, d_logits.to(logits.gradient_dtype))

    added = encoder.double()[rows.frame.long()] + predictor.double()[rows.state.long()]
    added.requires_grad_()
    (derivative,) = torch.autograd.grad(activate(added, activation).sum(), added)
    # Of these it follows from the value, as the GEMM has it.
    derivatives = {"tanh": 1 - hidden**2, "sigmoid": hidden * (1 - hidden)}
    d_sum = d_logits.double() * derivatives.get(activation, derivative)
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


def log_probabilities(topology: Topology, logits: Tensor, columns: Tensor) -> Tensor:
    """Of each symbol of some rows, whose columns these are. [R, S]"""
    groups = [symbol.softmax for symbol in topology.symbols]
    values = logits.gather(1, columns.clamp(min=0))
    values = values.masked_fill(columns == ZERO_LOGIT, 0.0)
    values = values.masked_fill(columns == NO_LABEL, -torch.inf)
    tokens = logits[:, : topology.tokens(logits.shape[1])]
    normalizers = []
    for group in groups:
        mine = [s for s, other in enumerate(groups) if other == 1]
        if group == 1:
            normalizers.append(values[:, mine].logsumexp(1))
        else:
            token = torch.arange(tokens.shape[1], device=logits.device)
            is_elsewhere = (token == columns[:, mine].unsqueeze(2)).any(1)
            normalizers.append(tokens.masked_fill(is_elsewhere, -torch.inf).logsumexp(1))
    scores = values - torch.stack(normalizers, 1)
    return scores.masked_fill(columns == NO_LABEL, -torch.inf)


def logit_gradient(
    topology: Topology, logits: Tensor, columns: Tensor, occupancy: Tensor
) -> Tensor:
    """That of −Σ γ·log p, by autograd. [R, V]"""
    with torch.enable_grad():
        x = logits.detach().requires_grad_()
        scores = log_probabilities(topology, x, columns).masked_fill(columns == NO_LABEL, 0.0)
        (gradient,) = torch.autograd.grad(-(occupancy * scores).sum(), x)
    return gradient


@pytest.mark.parametrize("kernels", [EMULATOR, EAGER, CUDA], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    """Copied to a chunk, of elements two apart, and their gradient back; nothing else is touched."""
    lengths, columns = [(4, 3), (1, 0), (3, 1)], 37
    nodes = kernels.nodes(lengths)
    shape = len(lengths), 4, 4, columns
    given = kernels.guard(torch.randn(*shape, 2).to(dtype))[..., 0]
    gradient = kernels.guard(torch.full(shape, 7.0, dtype=dtype))
    chunk = kernels.backend.given_chunk(given, gradient)
    kept = torch.arange(0, len(nodes.rows), 3, device=kernels.device)
    chunk.allocate(len(kept))
    rows, group = nodes.rows.at(kept), chunk.group(nodes.packed)
    values = group.logits(rows).values
    places = [(s, t, u) for s, (T, U) in enumerate(lengths) for t in range(T) for u in range(U + 1)]
    expected = gradient.clone()
    for row, place in enumerate(places[::3]):
        assert torch.equal(values[row], given[place].to(values.dtype))
        expected[place] = row - 2.5
    d_logits = torch.arange(len(kept), device=kernels.device).unsqueeze(1) - 2.5
    group.backward(rows, kernels.rows(d_logits.expand(-1, columns).to(dtype)))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    ("topology", "vocab_size"),
    [
        *(("rnnt", size) for size in (1, 2, 31, 128, 257, 1030)),
        *itertools.product(("multi-blank", "tdt", "hat"), (9, 132)),
        ("tdt", 1030),
    ],
)
@pytest.mark.parametrize(
    ("kernels", "dtype", "has_bias"),
    logits_cases(DTYPES[:3], DTYPES[:2]),
    indirect=["kernels"],
)
def test_symbol_scores(
    kernels: Kernels, dtype: torch.dtype, topology: str, vocab_size: int, has_bias: bool
) -> None:
    tables = TOPOLOGIES[topology]
    nodes = kernels.nodes([(4, 3), (1, 0), (3, 1)], max(2, vocab_size), tables)
    columns = tables.columns(nodes.packed.next_label, 0, vocab_size)
    if vocab_size == 1:
        columns[:, 1] = NO_LABEL
    x = torch.randn(len(nodes.rows), vocab_size, dtype=dtype, device=kernels.device) * 5
    bias = torch.randn(1, vocab_size, dtype=dtype, device=kernels.device) if has_bias else None
    if vocab_size > 30:
        x[:, 7] = -torch.inf  # a forbidden token
    real = torch.promote_types(dtype, torch.float32)
    total = (x.to(real) if bias is None else x.to(real) + bias).double()
    row_columns = columns[nodes.rows.state.long()]
    expected = log_probabilities(tables, total, row_columns)

    logits = Logits(kernels.rows(x), None if bias is None else kernels.rows(bias)[0], dtype)
    scores = kernels.guard(torch.full_like(expected, NAN))
    kernels.backend.symbol_scores(tables, logits, columns, nodes.rows, True, scores)
    unit = rounding(real)
    torch.testing.assert_close(scores, expected, rtol=8 * unit, atol=8 * unit)

    raw = Logits(kernels.rows(x), None, dtype)
    kernels.backend.symbol_scores(tables, raw, columns, nodes.rows, False, scores)
    expected = x.double().gather(1, row_columns.clamp(min=0))
    expected = expected.masked_fill(row_columns == ZERO_LOGIT, 0.0)
    expected = expected.masked_fill(row_columns == NO_LABEL, -torch.inf)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(("topology", "symbol"), [("rnnt", 0), ("hat", 0), ("tdt", 3)])
def test_symbol_scores_of_an_almost_certain_symbol(
    kernels: Kernels, topology: str, symbol: int
) -> None:
    """log p rounds as float64 does at 1, however small it is; float32 would give 0."""
    tables = TOPOLOGIES[topology]
    nodes = kernels.nodes([(3, 2)], 100, tables)
    columns = tables.columns(nodes.packed.next_label, 0, 100)
    x = torch.randn(len(nodes.rows), 100, device=kernels.device)
    column = int(columns[0, symbol])
    x[:, column] += 30
    scores = torch.full((len(nodes.rows), len(tables.symbols)), NAN, dtype=torch.float64)
    scores = kernels.guard(scores)
    logits = Logits(kernels.rows(x), None, torch.float32)
    kernels.backend.symbol_scores(tables, logits, columns, nodes.rows, True, scores)
    others = {
        "rnnt": x[:, 1:],
        "hat": torch.zeros_like(x[:, :1]),
        "tdt": torch.cat((x[:, 96:column], x[:, column + 1 :]), 1),
    }[topology]
    expected = -(others.double() - x.double()[:, column : column + 1]).exp().sum(1).log1p()
    # Float32 differences of logits round at their size, 30.
    torch.testing.assert_close(scores[:, symbol], expected, rtol=4e-6, atol=2**-52)
    assert expected.abs().max() < 1e-9


def test_symbol_scores_that_are_not_numbers(kernels: Kernels) -> None:
    """NaN, +∞, and a row of −∞ alone give NaN, in their row only."""
    nodes = kernels.nodes([(4, 1)], 40)
    columns = RNNT.columns(nodes.packed.next_label, 0, 40)
    x = torch.randn(len(nodes.rows), 40, device=kernels.device)
    x[1, 30], x[3, 5], x[5] = NAN, torch.inf, -torch.inf
    scores = kernels.guard(torch.zeros(len(nodes.rows), 2, dtype=torch.float64))
    logits = Logits(kernels.rows(x), None, torch.float32)
    kernels.backend.symbol_scores(RNNT, logits, columns, nodes.rows, True, scores)
    assert scores[:, 0].isnan().nonzero().flatten().tolist() == [1, 3, 5]


def test_symbol_scores_where_no_token_is_left(kernels: Kernels) -> None:
    """A symbol that there is not stays impossible, whatever its group sums to."""
    topology = TOPOLOGIES["hat"]
    nodes = kernels.nodes([(4, 0)], 40, topology)
    columns = topology.columns(nodes.packed.next_label, 0, 40)
    x = torch.randn(len(nodes.rows), 40, device=kernels.device)
    x[:, 1:] = -torch.inf
    scores = kernels.guard(torch.full((len(nodes.rows), 3), NAN, dtype=torch.float64))
    logits = Logits(kernels.rows(x), None, torch.float32)
    kernels.backend.symbol_scores(topology, logits, columns, nodes.rows, True, scores)
    blank = x[:, 0].double()
    torch.testing.assert_close(
        scores[:, 0], torch.nn.functional.logsigmoid(blank), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        scores[:, 2], torch.nn.functional.logsigmoid(-blank), rtol=1e-6, atol=0
    )
    assert (scores[:, 1] == -torch.inf).all()


def random_scores(kernels: Kernels, nodes: Nodes, topology: Topology) -> Tensor:
    """Log-probabilities of symbols, −∞ where there is no label. [N, S]"""
    symbols = topology.symbols
    shape = (len(nodes.rows), len(symbols) + 1)
    scores = torch.randn(shape, dtype=torch.float64, device=kernels.device).mul(3).log_softmax(1)
    is_last = (nodes.packed.next_label == NO_LABEL)[nodes.rows.state.long()]
    for s, symbol in enumerate(symbols):
        if symbol.source == "label":
            scores[:, s].masked_fill_(is_last, -torch.inf)
    return kernels.guard(scores[:, : len(symbols)].contiguous())


@OF_A_LATTICE
@pytest.mark.parametrize(("topology", "is_regularized"), REGULARIZED)
def test_lattice_is_a_sum_over_paths(kernels: Kernels, topology: str, is_regularized: bool) -> None:
    tables = TOPOLOGIES[topology]
    if is_regularized:
        tables = tables.regularized(0.5, 0.1)
    lengths = [*itertools.product([1, 2, 4, 6], [0, 1, 3]), (5, 6)]
    nodes = kernels.nodes(lengths)
    scores = random_scores(kernels, nodes, tables)
    lattice = kernels.backend.forward_backward(tables, nodes, scores, occupancies=True)
    alone = kernels.backend.forward_backward(tables, nodes, scores, occupancies=False)
    assert alone.occupancy is None
    assert torch.equal(alone.log_likelihood, lattice.log_likelihood)
    assert lattice.occupancy is not None
    sizes = [frames * (labels + 1) for frames, labels in lengths]
    samples = zip(
        lengths, scores.cpu().split(sizes), lattice.occupancy.cpu().split(sizes), strict=True
    )
    for sample, ((frames, labels), mine, occupancy) in enumerate(samples):
        expected = sum_over_paths(tables, frames, labels, all_nodes(frames, labels), mine)
        log_likelihood = lattice.log_likelihood[sample].cpu()
        if expected is None:
            assert topology in AT_MOST_ONE_LABEL_A_FRAME
            assert labels > frames
            assert log_likelihood == -torch.inf
            continue
        torch.testing.assert_close(log_likelihood, expected[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(occupancy, expected[1], rtol=1e-11, atol=1e-14)


LATTICES = {
    "ragged": RAGGED,
    "one-frame": [(1, 0)],
    "one-frame-many-labels": [(1, 1500)],
    "more-labels-than-threads": [(3, 1100), (5, 40)],
    "long": [(300, 30)],
}
# What differs where states are many is whether an arc reaches beyond the last diagonals.
LATTICES_OF_TOPOLOGIES = [
    (lengths, topology)
    for lengths in LATTICES
    for topology in (TOPOLOGIES if lengths in ("ragged", "long") else ("rnnt", "tdt"))
]


@pytest.mark.parametrize(("lengths", "topology"), LATTICES_OF_TOPOLOGIES)
def test_lattice(kernels: Kernels, topology: str, lengths: str) -> None:
    tables = TOPOLOGIES[topology]
    if topology != "rnnt":
        tables = tables.regularized(0.5, 0.001)
    check_lattice(kernels, LATTICES[lengths], tables, topology in AT_MOST_ONE_LABEL_A_FRAME)


@pytest.mark.parametrize("topology", [topologies.tdt(), topologies.star(0.5)], ids=["tdt", "star"])
def test_lattice_of_many_rounds(
    kernels: Kernels, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warps that begin again when they are through with their states, or wait for others' values;
    star has arcs without symbols."""
    monkeypatch.setattr("rnnt_op.backends.lattice_walk.max_threads", lambda topology: 64)
    check_lattice(kernels, [(100, 150), (20, 140), (70, 70), (90, 20)], topology)


def test_lattice_of_long_arcs(kernels: Kernels) -> None:
    """Their history does not fit in shared memory."""
    tables = topologies.tdt((0, 1, 20))
    assert Walk(tables, 60, 71).bytes > CudaBackend.SHARED_BYTES
    check_lattice(kernels, [(60, 70), (19, 3)], tables)


def check_lattice(
    kernels: Kernels,
    sizes: Sequence[tuple[int, int]],
    tables: Topology,
    may_have_no_path: bool = False,
) -> None:
    """Against the anti-diagonal recursion in torch operations, which sums over paths prove."""
    nodes = kernels.nodes(sizes)
    scores = random_scores(kernels, nodes, tables)
    lattice = kernels.backend.forward_backward(tables, nodes, scores, occupancies=True)
    host = pack_nodes(group(sizes), torch.zeros(len(sizes), max(u for _, u in sizes)).long(), eager)
    expected = eager.forward_backward(tables, host, scores.cpu(), occupancies=True)
    assert lattice.occupancy is not None
    assert expected.occupancy is not None
    feasible = expected.log_likelihood.isfinite()
    assert may_have_no_path or feasible.all()
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
    if tables is RNNT:
        total = torch.zeros(len(sizes), dtype=torch.float64)
        total.index_add_(0, host.sample_of(host.rows), lattice.occupancy.cpu().sum(1))
        path = torch.tensor([float(t + u) for t, u in sizes], dtype=torch.float64)
        torch.testing.assert_close(total, path, rtol=1e-10, atol=0)


def test_lattice_of_one_path(kernels: Kernels) -> None:
    """The mantissas of its probabilities are all above 1, or all below: their product leaves a double's
    range where it is not normalized on the way."""
    frames, probability = 2600, torch.tensor([0.7, 0.71], dtype=torch.float64)
    nodes = kernels.nodes([(frames, 0)] * 2)
    scores = torch.full((2, frames, 2), -torch.inf, dtype=torch.float64, device=kernels.device)
    scores[:, :, 0] = probability.log().unsqueeze(1)
    scores = kernels.guard(scores.view(-1, 2))
    lattice = kernels.backend.forward_backward(RNNT, nodes, scores, occupancies=True)
    expected = frames * probability.log()
    torch.testing.assert_close(lattice.log_likelihood.cpu(), expected, rtol=1e-13, atol=0)
    assert lattice.occupancy is not None
    occupancy = lattice.occupancy.cpu()
    torch.testing.assert_close(occupancy[:, 0], torch.ones_like(occupancy[:, 0]), rtol=1e-9, atol=0)
    assert (occupancy[:, 1] == 0).all()


def test_what_scores_no_arc_is_not_read(kernels: Kernels) -> None:
    """A blank on the last frame leads to the end from the last state alone."""
    sizes = [(5, 3), (7, 40)]
    nodes = kernels.nodes(sizes)
    scores = random_scores(kernels, nodes, RNNT).clone()
    expected = kernels.backend.forward_backward(RNNT, nodes, scores, occupancies=True)
    scores[4 * 4 : 4 * 4 + 3, 0] = NAN
    scores[-41:-1, 0] = NAN
    lattice = kernels.backend.forward_backward(RNNT, nodes, scores, occupancies=True)
    assert torch.equal(lattice.log_likelihood, expected.log_likelihood)
    assert lattice.occupancy is not None
    assert expected.occupancy is not None
    assert torch.equal(lattice.occupancy, expected.occupancy)


@pytest.mark.parametrize("scale", [1e-3, 1e4, 1e12, 1e35])
def test_lattice_of_any_magnitude(kernels: Kernels, scale: float) -> None:
    """Probabilities that no float64 holds, and arcs that rule each other out."""
    sizes = [(30, 12), (1, 3), (9, 0)]
    nodes = kernels.nodes(sizes)
    scores = kernels.guard(random_scores(kernels, nodes, RNNT) * scale)
    lattice = kernels.backend.forward_backward(RNNT, nodes, scores, occupancies=True)
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
def test_lattice_with_forbidden_arcs(kernels: Kernels, forbidden: float) -> None:
    """−∞ closes a path; where all are closed the likelihood is 0, and NaN stays NaN."""
    sizes = [(4, 2), (4, 2), (4, 2)]
    nodes = kernels.nodes(sizes)
    scores = random_scores(kernels, nodes, RNNT).view(3, 4, 3, 2)
    scores[0, 1, 1, 0] = scores[0, 2, 0, 1] = forbidden
    scores[1, :, 0, 1] = -torch.inf
    scores[2, 0, 0, 0] = NAN
    scores = kernels.guard(scores.view(-1, 2).clone())
    lattice = kernels.backend.forward_backward(RNNT, nodes, scores, occupancies=True)
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
    topology: Topology
    nodes: Nodes
    columns: Tensor
    logits: Tensor  # float64. [N, V]
    scores: Tensor
    occupancy: Tensor

    def logit_gradient(self) -> Tensor:
        """At unit scale. [N, V]"""
        columns = self.columns[self.nodes.rows.state.long()]
        return logit_gradient(self.topology, self.logits, columns, self.occupancy)


def scored(
    kernels: Kernels,
    lengths: Sequence[tuple[int, int]],
    *,
    vocab_size: int,
    scale: float,
    topology: Topology = RNNT,
    no_blank: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> Scored:
    """A random problem, its logits rounded to a dtype; some nodes must not emit blank."""
    nodes = kernels.nodes(lengths, vocab_size, topology)
    columns = topology.columns(nodes.packed.next_label, 0, vocab_size)
    logits = torch.randn(len(nodes.rows), vocab_size, device=kernels.device).double() * scale
    if dtype is not None:
        logits = logits.to(dtype).double()
    logits[list(no_blank), 0] = -torch.inf
    scores = log_probabilities(topology, logits, columns[nodes.rows.state.long()])
    scores = kernels.guard(scores)
    lattice = kernels.backend.forward_backward(topology, nodes, scores, occupancies=True)
    assert lattice.occupancy is not None
    return Scored(topology, nodes, columns, logits, scores, lattice.occupancy)


@pytest.mark.parametrize(
    ("topology", "scale"),
    [
        *(("rnnt", scale) for scale in (0.0, 1.0, 3.0, 10.0)),
        *((name, 3.0) for name in TOPOLOGIES if name != "rnnt"),
    ],
)
@OF_A_LATTICE
def test_selection(kernels: Kernels, topology: str, scale: float) -> None:
    """What is skipped is bounded, in every sample; whose loss is bad, or unwanted, is another's."""
    lengths = RAGGED if topology == "rnnt" else FEASIBLE
    problem = scored(
        kernels,
        [*lengths, (40, 20), (31, 30)],
        vocab_size=9,
        scale=scale,
        topology=TOPOLOGIES[topology].regularized(0.5 * (topology != "rnnt"), 0.0),
    )
    nodes, samples = problem.nodes, len(lengths) + 2
    sample = nodes.sample_of(nodes.rows)
    weight = torch.full((samples,), -0.5, dtype=torch.float64, device=kernels.device)
    weight[1:3] = torch.tensor([0.0, NAN])
    mass = problem.logit_gradient().abs().sum(1)
    for tolerance in (0.5, 1e-3, 1e-6, 1e-9, 0.0):
        kept = kernels.backend.select_nodes(
            problem.topology,
            nodes,
            problem.scores,
            kernels.guard(problem.occupancy.clone()),
            weight=kernels.guard(weight.clone()),
            tolerance=tolerance,
            least=0.0,
        )()
        assert kept.dtype == torch.int64
        assert (kept.diff() > 0).all()
        is_kept = torch.zeros(len(nodes.rows), dtype=torch.bool, device=kernels.device)
        is_kept[kept] = True
        assert not is_kept[sample == 1].any()
        assert is_kept[sample == 2].all()
        for s in set(range(samples)) - {1, 2}:
            mine = sample == s
            skipped, total = mass[mine & ~is_kept], mass[mine].sum()
            assert skipped.sum() <= tolerance * total * (1 + 1e-9) + 1e-13
            if len(skipped):
                assert skipped.max() <= mass[mine & is_kept].min() * 1.25
        if tolerance == 0.5 and scale > 0:
            assert len(kept) < len(nodes.rows) / 2


def test_selection_of_many_nodes(kernels: Kernels) -> None:
    """More blocks than one; every node of positive mass is kept at tolerance zero, in order."""
    problem = scored(kernels, [(60, 50), (1, 0), (45, 77)], vocab_size=3, scale=1.0)
    kept = kernels.backend.select_nodes(
        RNNT,
        problem.nodes,
        problem.scores,
        problem.occupancy,
        weight=torch.ones(3, dtype=torch.float64, device=kernels.device),
        tolerance=0.0,
        least=0.0,
    )()
    mass = eager.gradient_mass(RNNT, problem.scores, problem.occupancy)
    torch.testing.assert_close(kept, mass.nonzero().flatten())


@pytest.mark.parametrize("factor", [1.0, -1e-20, 1e20])
def test_selection_of_what_is_not_zero(kernels: Kernels, factor: float) -> None:
    """Of a sample whose gradient is scaled, what is scaled counts."""
    problem = scored(kernels, [(60, 50), (45, 77)], vocab_size=3, scale=3.0)
    weight = torch.tensor([factor, 2 * factor], dtype=torch.float64, device=kernels.device)
    least = 1e-9 * abs(factor)
    kept = kernels.backend.select_nodes(
        RNNT,
        problem.nodes,
        problem.scores,
        problem.occupancy,
        weight=kernels.guard(weight.clone()),
        tolerance=0.0,
        least=least,
    )()
    mass = eager.gradient_mass(RNNT, problem.scores, problem.occupancy)
    mass *= weight[problem.nodes.sample_of(problem.nodes.rows)].abs()
    is_kept = torch.zeros_like(mass, dtype=torch.bool)
    is_kept[kept] = True
    assert is_kept[mass >= least].all()
    assert not is_kept[mass < 0.8 * least].any()
    assert 0 < len(kept) < 0.9 * len(mass)


def test_selection_of_what_float64_can_hold(kernels: Kernels) -> None:
    """However small a sample's weight is."""
    problem = scored(kernels, [(9, 5)], vocab_size=3, scale=1.0)
    kept = kernels.backend.select_nodes(
        RNNT,
        problem.nodes,
        problem.scores,
        problem.occupancy,
        weight=torch.full((1,), 1e-50, dtype=torch.float64, device=kernels.device),
        tolerance=0.0,
        least=least_gradient(torch.float64),
    )()
    assert len(kept) == len(problem.nodes.rows)


@pytest.mark.parametrize(
    ("kernels", "dtype", "_"), logits_cases(DTYPES[:3], DTYPES[:3]), indirect=["kernels"]
)
def test_least_gradient(kernels: Kernels, dtype: torch.dtype, _: bool) -> None:
    """A CPU's GEMMs get no numbers that would slow them."""
    real = torch.promote_types(dtype, torch.float32)
    problem = scored(kernels, [(5, 3), (2, 6)], vocab_size=37, scale=6.0, dtype=real)
    least = least_gradient(dtype)
    expected = problem.logit_gradient() * (3 * least)
    kept = torch.arange(len(problem.nodes.rows), device=kernels.device)
    actual = kernels.backend.logit_gradient_(
        RNNT,
        Logits(kernels.rows(problem.logits.to(real)), None, dtype),
        problem.columns,
        problem.nodes.rows,
        kept,
        problem.nodes,
        problem.scores,
        problem.occupancy * (3 * least),
        torch.ones(2, dtype=torch.float64, device=kernels.device),
        normalize=True,
        clamp=0.0,
    ).double()
    assert ((actual - expected).abs() <= least + 0.01 * expected.abs()).all()
    assert (actual.abs() >= 1.01 * least).any()
    if kernels.device.type == "cpu" and kernels.name != "emulator":
        assert ((actual == 0) | (actual.abs() >= 0.99 * least)).all()
        assert (actual == 0).any()


@pytest.mark.parametrize(
    ("topology", "vocab_size", "clamp"),
    [
        *(("rnnt", size, clamp) for size in (31, 1030) for clamp in (0.0, 0.01)),
        *(("rnnt", size, 0.01) for size in (2, 128, 257)),
        *((name, 9, 0.01) for name in ("multi-blank", "tdt", "hat", "hat-constrained")),
        *((name, 261, 0.0) for name in ("multi-blank", "tdt", "hat", "hat-constrained")),
    ],
)
@pytest.mark.parametrize(
    ("kernels", "dtype", "has_bias"), logits_cases(DTYPES[:3], DTYPES), indirect=["kernels"]
)
def test_logit_gradient(
    kernels: Kernels,
    dtype: torch.dtype,
    topology: str,
    vocab_size: int,
    has_bias: bool,
    clamp: float,
) -> None:
    real = torch.promote_types(dtype, torch.float32)
    problem = scored(
        kernels,
        [(5, 3), (1, 0), (2, 6)],
        vocab_size=vocab_size,
        scale=2.0,
        topology=TOPOLOGIES[topology].regularized(0.5 * (topology != "rnnt"), 0.0),
        dtype=None if has_bias else real,
    )
    nodes, n = problem.nodes, len(problem.nodes.rows)
    kept = torch.randperm(n, device=kernels.device)[: n * 2 // 3].sort().values
    rows = nodes.rows.at(kept)
    weight = torch.tensor([0.5, -2.0, NAN], dtype=torch.float64, device=kernels.device)
    bias = torch.randn(1, vocab_size, device=kernels.device) if has_bias else None
    x = problem.logits[kept] - (0 if bias is None else bias)
    chunk = Logits(
        kernels.rows(x.to(real)),
        None if bias is None else kernels.rows(bias.to(real))[0],
        dtype,
    )
    actual = kernels.backend.logit_gradient_(
        problem.topology,
        chunk,
        problem.columns,
        rows,
        kernels.guard(kept.clone()),
        nodes,
        problem.scores,
        problem.occupancy,
        kernels.guard(weight.clone()),
        normalize=True,
        clamp=clamp,
    )
    assert actual.dtype == dtype
    assert actual.shape == (len(kept), vocab_size)
    assert actual.data_ptr() == chunk.values.data_ptr()

    expected = problem.logit_gradient()[kept]
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


def test_logit_gradient_without_blank(kernels: Kernels) -> None:
    """The normaliser comes from an arc that is possible."""
    problem = scored(kernels, [(5, 3)], vocab_size=9, scale=1.0, no_blank=[0, 5])
    actual = kernels.backend.logit_gradient_(
        problem.topology,
        Logits(kernels.rows(problem.logits), None, torch.float64),
        problem.columns,
        problem.nodes.rows,
        torch.arange(len(problem.logits), device=kernels.device),
        problem.nodes,
        problem.scores,
        problem.occupancy,
        torch.ones(1, dtype=torch.float64, device=kernels.device),
        normalize=True,
        clamp=-1.0,
    )
    torch.testing.assert_close(actual, problem.logit_gradient(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topology", ["tdt", "hat"])
def test_logit_gradient_beside_other_groups(
    kernels: Kernels, topology: str, dtype: torch.dtype
) -> None:
    """Group 1's logits may be out of all proportion to group 0's; and the latter is left alone
    where no symbol of it is."""
    tables = TOPOLOGIES[topology]
    problem = scored(kernels, [(5, 3), (4, 0)], vocab_size=40, scale=1.0, topology=tables)
    logits = problem.logits
    is_last = (problem.nodes.packed.next_label == NO_LABEL)[problem.nodes.rows.state.long()]
    if topology == "tdt":
        logits[:, -4:] += 500
    else:
        logits[:, 0] += 200
        logits[is_last, 3], logits[is_last, 9] = -torch.inf, 6e4
    real = torch.promote_types(dtype, torch.float32)
    logits = logits.to(real)
    columns = problem.columns[problem.nodes.rows.state.long()]
    scores = log_probabilities(tables, logits.double(), columns)
    actual = kernels.backend.logit_gradient_(
        tables,
        Logits(kernels.rows(logits), None, dtype),
        problem.columns,
        problem.nodes.rows,
        torch.arange(len(logits), device=kernels.device),
        problem.nodes,
        kernels.guard(scores),
        problem.occupancy,
        torch.ones(2, dtype=torch.float64, device=kernels.device),
        normalize=True,
        clamp=-1.0,
    )
    expected = logit_gradient(tables, logits.double(), columns, problem.occupancy)
    torch.testing.assert_close(
        actual.double(), expected, rtol=rounding(dtype) + 32 * rounding(real), atol=1e-6
    )
    if topology == "hat":
        assert (actual[is_last, 1:] == 0).all()


def test_logit_gradient_of_large_logits(kernels: Kernels) -> None:
    """The normaliser is as exact as differences of logits, however large both are."""
    problem = scored(kernels, [(5, 3)], vocab_size=70, scale=2.0)
    # Multiples of 2^-10 near 2^13 are float32 numbers.
    logits = problem.logits.mul(2**10).round() / 2**10 + 5000
    columns = problem.columns[problem.nodes.rows.state.long()]
    scores = log_probabilities(RNNT, logits, columns)
    actual = kernels.backend.logit_gradient_(
        problem.topology,
        Logits(kernels.rows(logits.float()), None, torch.float32),
        problem.columns,
        problem.nodes.rows,
        torch.arange(len(logits), device=kernels.device),
        problem.nodes,
        scores,
        problem.occupancy,
        torch.ones(1, dtype=torch.float64, device=kernels.device),
        normalize=True,
        clamp=-1.0,
    )
    expected = logit_gradient(RNNT, logits, columns, problem.occupancy)
    torch.testing.assert_close(actual.double(), expected, rtol=4e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topology", ["rnnt", "tdt", "hat"])
def test_logit_gradient_of_log_probabilities(
    kernels: Kernels, topology: str, dtype: torch.dtype
) -> None:
    tables = TOPOLOGIES[topology]
    problem = scored(kernels, [(5, 3), (2, 6)], vocab_size=20, scale=1.0, topology=tables)
    kept = torch.arange(len(problem.nodes.rows), device=kernels.device)
    weight = torch.ones(2, dtype=torch.float64, device=kernels.device)
    actual = kernels.backend.logit_gradient_(
        problem.topology,
        Logits(
            kernels.rows(problem.logits.to(torch.promote_types(dtype, torch.float32))), None, dtype
        ),
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
    columns = problem.columns[problem.nodes.rows.state.long()]
    occupancy = problem.occupancy.masked_fill(columns < 0, 0.0)
    expected = torch.zeros_like(problem.logits)
    expected.scatter_add_(1, columns.clamp(min=0), -occupancy)
    torch.testing.assert_close(actual.to(dtype), expected.to(dtype), rtol=rounding(dtype), atol=0)
