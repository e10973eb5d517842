"""Dropout of the joint network's hidden states, and the joint without an output layer.

Masks are those of a generator that is written out in Python's integers (``masks``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from masks import is_kept, philox
from problems import network_arguments
from tested_backends import CUDA, EAGER, EMULATOR, NATIVE
from torch import Tensor

from rnnt_op.activations import ACTIVATIONS, activate
from rnnt_op.backends import backend_for
from rnnt_op.backends.dropout import philox as philox_of_tensors
from rnnt_op.backends.protocol import Backend, JointChunk
from rnnt_op.backends.records import Dropout, JointStates, JointSums, Logits
from rnnt_op.logits import JointLogits, Wanted
from rnnt_op.nodes import FramesAndStates, Nodes, Rows, pack_nodes
from rnnt_op.plan import Group

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# A dtype for each activation: test_kernels has all pairs, without dropout.
DTYPES_AND_ACTIVATIONS = pytest.mark.parametrize(
    ("dtype", "activation"),
    [(DTYPES[number % 4], activation) for number, activation in enumerate(ACTIVATIONS)],
)
JOINT_DIMS = [1, 3, 7, 33, 130]
SEEDS = [0, 5, -1, -(2**63), 2**32 + 17, 2**63 - 1]
RATES = [0.1, 0.5, 0.999]
ON_EVERY_BACKEND = pytest.mark.parametrize(
    "backend", [NATIVE, EAGER, EMULATOR, CUDA], indirect=True
)
BITS_32 = 2**32 - 1
RAGGED = Group((5, 0, 3), (4, 1, 3), (3, 6, 1))  # in another order than the batch

KNOWN = [  # Random123's kat_vectors, of philox4x32 with 10 rounds: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((BITS_32,) * 4, (BITS_32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def mask(dropout: Dropout, rows: Rows, packed: FramesAndStates, joint_dim: int) -> Tensor:
    """Zero where a hidden state is dropped, float64. [R, H]"""
    samples, t = (positions.tolist() for positions in packed.frame_positions)
    u = packed.state_index.tolist()
    nodes = [
        (samples[frame], t[frame], u[state])
        for frame, state in zip(rows.frame.tolist(), rows.state.tolist(), strict=True)
    ]
    return _mask(dropout.probability, int(dropout.seed), tuple(nodes), joint_dim)


@functools.cache
def _mask(
    probability: float, seed: int, nodes: tuple[tuple[int, int, int], ...], joint_dim: int
) -> Tensor:
    """The same of every dtype, activation and backend, and slow in Python's integers."""
    dropout = dropout_of(probability, seed)
    kept = [[is_kept(dropout, node, h) for h in range(joint_dim)] for node in nodes]
    return torch.tensor(kept, dtype=torch.float64)


def current_backend() -> Backend:
    return backend_for(torch.empty(0).device)


def some_nodes(group: Group = RAGGED) -> Nodes:
    targets = torch.zeros(max(group.samples) + 1, max(group.states) - 1, dtype=torch.int64)
    return pack_nodes(group, targets, current_backend())


def far_away(packed: FramesAndStates) -> FramesAndStates:
    """The same group late in a batch of long samples."""
    return replace(
        packed,
        samples=packed.samples + 1_000_000,
        frame_index=packed.frame_index + 70_000,
        state_index=packed.state_index + 100_000,
    )


def dropout_of(probability: float, seed: int = 0) -> Dropout:
    return Dropout(probability, torch.tensor([seed]))


def packed_states(
    chunk: JointChunk,
    packed: FramesAndStates,
    encoder: Tensor,
    predictor: Tensor,
    sums: JointSums,
) -> JointStates:
    def rows(states: Tensor) -> Tensor:
        positions = torch.zeros(len(states), dtype=torch.int64), torch.arange(len(states))
        return chunk.pack(states.unsqueeze(0), positions)

    return JointStates(packed, rows(encoder), rows(predictor), sums)


def through_identity(
    encoder: Tensor,
    predictor: Tensor,
    rows: Rows,
    packed: FramesAndStates,
    dropout: Dropout,
    *,
    activation: str = "identity",
    compute_dtype: torch.dtype,
) -> tuple[JointChunk, JointStates, Logits]:
    """A chunk whose logits are its hidden states. [R, H]"""
    chunk = current_backend().joint_chunk(
        torch.eye(encoder.shape[1], dtype=compute_dtype),
        None,
        activation=activation,
        input_dtype=encoder.dtype,
        compute_dtype=compute_dtype,
        dropout=dropout,
    )
    chunk.allocate(len(rows))
    states = packed_states(chunk, packed, encoder, predictor, state_sums(chunk, packed))
    return chunk, states, chunk.logits(states, rows)


def random_states(
    packed: FramesAndStates, joint_dim: int, dtype: torch.dtype, activation: str
) -> tuple[Tensor, Tensor]:
    encoder = torch.randn(len(packed.frame_sample), joint_dim)
    predictor = torch.randn(len(packed.state_sample), joint_dim)
    if activation == "relu":  # many sums of zero
        encoder, predictor = encoder.round(), predictor.round()
    return encoder.to(dtype), predictor.to(dtype)


def state_sums(
    chunk: JointChunk, packed: FramesAndStates, weight: Tensor | None = None
) -> JointSums:
    frames, states = len(packed.frame_sample), len(packed.state_sample)
    return JointSums(chunk.zeros(frames), chunk.zeros(states), weight, None)


def of_states(sums: JointSums) -> tuple[Tensor, Tensor]:
    assert sums.encoder_rows is not None
    assert sums.predictor_rows is not None
    return sums.encoder_rows, sums.predictor_rows


def gradient_of(logits: Logits, d_logits: Tensor) -> Tensor:
    """A gradient in the logits' memory, as ``logit_gradient_`` leaves it. [R, V]"""
    values = logits.values
    n, pitch = len(values), values.stride(0)
    wide = values.as_strided((n, pitch), (pitch, 1)).view(logits.gradient_dtype)
    return wide[:, : values.shape[1]].copy_(d_logits)


def assert_near(actual: Tensor | None, expected: Tensor, allowed: float) -> None:
    """To a relative L2 distance; zeros exactly."""
    assert actual is not None
    assert torch.linalg.norm(actual.double() - expected) <= allowed * torch.linalg.norm(expected)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox(counter, key) == words
    x, y, z, w, low, high = (torch.tensor([word]) for word in (*counter, *key))
    assert tuple(map(int, philox_of_tensors(x, y, z, w, (low, high)))) == words


@ON_EVERY_BACKEND
@DTYPES_AND_ACTIVATIONS
def test_hidden(backend: str, dtype: torch.dtype, activation: str) -> None:
    nodes = some_nodes()
    real = torch.promote_types(dtype, torch.float32)
    for i, joint_dim in enumerate(JOINT_DIMS):
        packed = far_away(nodes.packed) if i % 2 else nodes.packed
        rows = nodes.rows.at(slice(4 * (i % 3), len(nodes.rows) - i))
        dropout = dropout_of(RATES[i % 3], SEEDS[i])
        encoder, predictor = random_states(packed, joint_dim, dtype, activation)
        *_, logits = through_identity(
            encoder, predictor, rows, packed, dropout, activation=activation, compute_dtype=dtype
        )
        sums = encoder.double()[rows.frame.long()] + predictor.double()[rows.state.long()]
        kept = mask(dropout, rows, packed, joint_dim)
        expected = activate(sums, activation) * kept / (1 - dropout.probability)
        # Rounded once to the operand; the instruction for bfloat16's tanh adds 2^-11.
        allowed = torch.finfo(dtype).eps / 2 + (2**-11 if dtype == torch.bfloat16 else 0)
        allowed += 6 * torch.finfo(real).eps * (1 + sums.abs())
        # torch's gelu is exact to the size of its argument, on the eager backend, too.
        size = sums.abs() / (1 - dropout.probability) if activation == "gelu" else expected.abs()
        assert ((logits.values.double() - expected).abs() <= allowed * size).all()


@ON_EVERY_BACKEND
@pytest.mark.parametrize("seed", SEEDS)
def test_mask(backend: str, seed: int) -> None:
    """Of a node, whatever its chunk and group."""
    joint_dim = 70
    dropout = dropout_of(0.5, seed)

    def dropped(nodes: Nodes, rows: Rows) -> Tensor:
        states = nodes.packed
        ones = torch.ones(len(states.frame_sample), joint_dim)
        zeros = torch.zeros(len(states.state_sample), joint_dim)
        *_, logits = through_identity(ones, zeros, rows, states, dropout, compute_dtype=ones.dtype)
        return logits.values == 0

    nodes = some_nodes()
    whole = dropped(nodes, nodes.rows)
    assert torch.equal(whole, mask(dropout, nodes.rows, nodes.packed, joint_dim) == 0)
    chosen = torch.tensor([2, 3, 11, 17, 20])
    assert torch.equal(dropped(nodes, nodes.rows.at(chosen)), whole[chosen])
    alone = some_nodes(Group((0,), (1,), (6,)))
    assert torch.equal(dropped(alone, alone.rows), whole[12:18])


@ON_EVERY_BACKEND
@pytest.mark.parametrize("probability", [2**-20, *RATES, 1 - 2**-40])
def test_share_of_dropped_states(backend: str, probability: float) -> None:
    nodes = some_nodes(Group((0,), (20,), (5,)))
    joint_dim = 640
    ones = torch.ones(20, joint_dim)
    zeros = torch.zeros(5, joint_dim)
    *_, logits = through_identity(
        ones, zeros, nodes.rows, nodes.packed, dropout_of(probability), compute_dtype=ones.dtype
    )
    deviation = (probability * (1 - probability) / logits.values.numel()) ** 0.5
    assert abs(float((logits.values == 0).double().mean()) - probability) <= 4 * deviation


@ON_EVERY_BACKEND
@DTYPES_AND_ACTIVATIONS
def test_gradients(backend: str, dtype: torch.dtype, activation: str) -> None:
    """Of a chunk that starts in the middle of a group, and adds to other chunks' sums."""
    nodes = some_nodes()
    eps = torch.finfo(dtype).eps
    allowed = 4 * eps if dtype.itemsize == 2 else 16 * eps
    for i, joint_dim in enumerate(JOINT_DIMS):
        packed = far_away(nodes.packed) if i % 2 else nodes.packed
        rows = nodes.rows.at(slice(5, len(nodes.rows) - 2))
        dropout = dropout_of(RATES[(i + 1) % 3], SEEDS[i + 1])
        encoder, predictor = random_states(packed, joint_dim, dtype, activation)
        weight, bias = torch.randn(6, joint_dim).to(dtype), torch.randn(6).to(dtype)
        d_logits = torch.randn(len(rows), 6).to(dtype)

        leaves = [x.double().clone().requires_grad_() for x in (encoder, predictor, weight, bias)]
        sums = leaves[0][rows.frame.long()] + leaves[1][rows.state.long()]
        kept = mask(dropout, rows, packed, joint_dim)
        hidden = activate(sums, activation) * kept / (1 - dropout.probability)
        logits = hidden @ leaves[2].t() + leaves[3]
        expected = torch.autograd.grad(logits, leaves, d_logits.double())

        chunk = current_backend().joint_chunk(
            weight,
            bias,
            activation=activation,
            input_dtype=dtype,
            compute_dtype=dtype,
            dropout=dropout,
        )
        chunk.allocate(len(rows))
        real = torch.promote_types(dtype, torch.float32)
        actual = replace(
            state_sums(chunk, packed, torch.zeros_like(weight, dtype=real)),
            bias=torch.zeros_like(bias, dtype=real),
        )
        states = packed_states(chunk, packed, encoder, predictor, actual)
        for times in (1, 2):
            found = chunk.logits(states, rows)
            values = found.values if found.bias is None else found.values + found.bias[:6]
            assert_near(values, logits.detach(), allowed)
            chunk.backward(states, rows, gradient_of(found, d_logits))
            for mine, gradient in zip(
                (*of_states(actual), actual.weight, actual.bias), expected, strict=True
            ):
                assert_near(mine, times * gradient, allowed)


@ON_EVERY_BACKEND
@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_zeros_are_not_dropped(backend: str, dtype: torch.dtype, activation: str) -> None:
    """A kept state that is zero of either sign, or that the operand rounds to zero, has a slope."""
    real = torch.promote_types(dtype, torch.float32)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    dropout = dropout_of(0.5, 3)  # scales by 2
    sizes = [0.0, least / 8, least / 4, least / 3.9, least / 2, least]
    values = torch.tensor([*sizes, *(-size for size in sizes)], dtype=real).repeat(5)
    nodes = some_nodes()
    frames, states = len(nodes.packed.frame_sample), len(nodes.packed.state_sample)
    # Of wide states, since half ones have no such sums; −0 leaves the sign of the other.
    encoder = values.expand(frames, -1).clone()
    predictor = torch.full((states, len(values)), -0.0, dtype=real)
    chunk, states, logits = through_identity(
        encoder,
        predictor,
        nodes.rows,
        nodes.packed,
        dropout,
        activation=activation,
        compute_dtype=dtype,
    )
    kept = mask(dropout, nodes.rows, nodes.packed, len(values))
    assert 0.4 < float(kept.mean()) < 0.6
    assert (logits.values[kept == 0] == 0).all()
    if activation == "identity" and dtype != torch.bfloat16:  # tanh and GEMMs lose subnormals
        assert ((logits.values.double() - 2 * values.double() * kept).abs() <= least / 2).all()
    d_logits = gradient_of(logits, torch.ones_like(logits.values))
    chunk.backward(states, nodes.rows, d_logits)
    for actual, segment in zip(
        of_states(states.sums), (nodes.rows.frame, nodes.rows.state), strict=True
    ):
        expected = torch.zeros(len(actual), len(values), dtype=torch.float64)
        expected.index_add_(0, segment.long(), 2 * kept)
        assert torch.equal(actual.double(), expected)


@ON_EVERY_BACKEND
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probability", [0.1, 0.7])
def test_saturated_states(
    backend: str, dtype: torch.dtype, activation: str, probability: float
) -> None:
    """No rounding gives them a slope of the wrong sign."""
    nodes = some_nodes()
    encoder = torch.full((len(nodes.packed.frame_sample), 40), 50.0, dtype=dtype)
    predictor = torch.zeros(len(nodes.packed.state_sample), 40, dtype=dtype)
    chunk, states, logits = through_identity(
        encoder,
        predictor,
        nodes.rows,
        nodes.packed,
        dropout_of(probability),
        activation=activation,
        compute_dtype=dtype,
    )
    d_logits = gradient_of(logits, torch.ones_like(logits.values))
    chunk.backward(states, nodes.rows, d_logits)
    steepest = 2 * torch.finfo(dtype).eps / (1 - probability)
    for actual in of_states(states.sums):
        assert (actual >= -1e-6 * steepest).all()
        assert (actual <= len(nodes.rows) * steepest).all()


@ON_EVERY_BACKEND
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "identity", "hardtanh", "gelu"])
def test_nan_reaches_dropped_states(backend: str, activation: str) -> None:
    """As it reaches all that a sample without a loss takes part in."""
    nodes = some_nodes()
    encoder, predictor = random_states(nodes.packed, 9, torch.float32, activation)
    chunk, states, logits = through_identity(
        encoder,
        predictor,
        nodes.rows,
        nodes.packed,
        dropout_of(0.9),
        activation=activation,
        compute_dtype=torch.float32,
    )
    d_logits = gradient_of(logits, torch.full_like(logits.values, torch.nan))
    chunk.backward(states, nodes.rows, d_logits)
    for actual in of_states(states.sums):
        assert actual.isnan().all()


# ---- without an output layer


INPUTS = [*((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.bfloat16)]


@ON_EVERY_BACKEND
@pytest.mark.parametrize("dtypes", INPUTS)
@pytest.mark.parametrize("joint_dim", [1, 7, 64, 130])
def test_additive_chunk(backend: str, dtypes: Sequence[torch.dtype], joint_dim: int) -> None:
    nodes = some_nodes()
    real = torch.promote_types(torch.promote_types(*dtypes), torch.float32)
    encoder = torch.randn(len(nodes.packed.frame_sample), joint_dim).to(dtypes[0])
    predictor = torch.randn(len(nodes.packed.state_sample), joint_dim).to(dtypes[1])
    chunk = current_backend().additive_chunk(
        joint_dim, input_dtype=dtypes[0] if dtypes[0] == dtypes[1] else None, like=encoder
    )
    chunk.allocate(len(nodes.rows))
    assert chunk.row_bytes >= joint_dim * real.itemsize
    sums = state_sums(chunk, nodes.packed)
    expected_sums = [torch.zeros_like(x, dtype=torch.float64) for x in (encoder, predictor)]
    for rows in (nodes.rows, nodes.rows.at(slice(5, 17))):
        frame, state = rows.frame.long(), rows.state.long()
        states = packed_states(chunk, nodes.packed, encoder, predictor, sums)
        logits = chunk.logits(states, rows)
        assert logits.bias is None
        assert logits.values.dtype == logits.gradient_dtype == real
        assert torch.equal(logits.values, encoder.to(real)[frame] + predictor.to(real)[state])
        d_logits = gradient_of(logits, torch.randn(len(rows), joint_dim))
        for expected, segment in zip(expected_sums, (frame, state), strict=True):
            expected.index_add_(0, segment, d_logits.double())
        chunk.backward(states, rows, d_logits)
    for actual, expected in zip(of_states(sums), expected_sums, strict=True):
        assert actual.dtype == real
        assert_near(actual, expected, 4 * torch.finfo(real).eps)


@ON_EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_without_output_layer(backend: str, dtype: torch.dtype) -> None:
    nodes = some_nodes()
    encoder, predictor = torch.randn(6, 4, 33).to(dtype), torch.randn(6, 6, 33).to(dtype)
    tensors = (encoder, predictor, None, None, None, None, None)
    source = JointLogits(
        backend_for(encoder.device),
        network_arguments(tensors, activation="identity"),
        wanted=Wanted(encoder=True, predictor=True),
    )
    assert source.column_count == 33
    source.allocate(len(nodes.rows), 0)
    group = source.group(nodes)
    logits = group.logits(nodes.rows)

    leaves = [x.double().clone().requires_grad_() for x in (encoder, predictor)]
    samples, t = nodes.packed.frame_positions
    frame, state = nodes.rows.frame.long(), nodes.rows.state.long()
    expected = leaves[0][samples[frame], t[frame]]
    expected = expected + leaves[1][samples[frame], nodes.packed.state_index[state]]
    assert_near(logits.values, expected.detach(), torch.finfo(logits.values.dtype).eps)

    d_logits = gradient_of(logits, torch.randn(len(nodes.rows), 33))
    gradients = torch.autograd.grad(expected, leaves, d_logits.double())
    group.backward(nodes.rows, d_logits)
    group.finish()
    *of_inputs, d_weight, d_bias = source.gradients()
    for actual, gradient in zip(of_inputs, gradients, strict=True):
        assert actual.dtype == dtype
        assert_near(actual, gradient, torch.finfo(dtype).eps)
    for unwanted in (d_weight, d_bias):
        assert unwanted.dtype == dtype
        assert unwanted.numel() == 0
