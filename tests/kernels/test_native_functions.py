"""Functions and roundings of the native kernels, over the whole range of their types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tested_backends import NEEDS_CXX
from torch import Tensor

from rnnt_op.activations import activate
from rnnt_op.backends.records import least_gradient
from rnnt_op.backends.sources import CPU, Precision, real_dtype
from rnnt_op.jit import load_host_module
from rnnt_op.topology import RNNT, Arc, Symbol, Topology

pytestmark = NEEDS_CXX

NAN = float("nan")
REALS = [torch.float64, torch.float32]
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, NAN, 5e-324, 1e-320, 1e-310, 1e-45, 1e-40, 1e-38, 1.0]


def sweep(dtype: torch.dtype, span: float) -> Tensor:
    """Bit patterns of all kinds, NaN of any payload among them; and numbers of any size up to
    ``span``."""
    real = torch.finfo(dtype)
    bits = torch.iinfo(BITS[dtype])
    anything = torch.randint(bits.min, bits.max, (300_000,), dtype=BITS[dtype]).view(dtype)
    powers = 2.0 ** torch.linspace(
        float(np.log2(real.smallest_normal)), float(np.log2(span)), 99_999
    )
    powers = torch.cat((powers, -powers)).to(dtype)
    ordinary = torch.linspace(-span, span, 400_001, dtype=dtype)
    special = torch.tensor([*SPECIAL, real.max, real.min], dtype=torch.float64).to(dtype)
    payloads = torch.full((2,), -1, dtype=BITS[dtype]).view(dtype)
    return torch.cat((anything, powers, ordinary, special, -special, payloads))


def wide(x: Tensor) -> NDArray[np.longdouble]:
    return x.double().numpy().astype(np.longdouble)


def ulps(actual: Tensor, truth: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    """Distance in units in the last place of the truth; zero where it underflows and may be 0."""
    real = torch.finfo(actual.dtype)
    numbers = np.float64 if actual.dtype == torch.float64 else np.float32
    with np.errstate(over="ignore", under="ignore"):
        unit = np.spacing(np.abs(truth).astype(numbers)).astype(np.longdouble)
    distance = np.abs(wide(actual) - truth) / unit
    is_flushed = (actual.numpy() == 0) & (np.abs(truth) < 4 * real.smallest_normal)
    return np.where(is_flushed, 0, distance)


def run_hidden(x: Tensor, activation: str, operand: torch.dtype) -> Tensor:
    """act(x), through one row of hidden states."""
    row = torch.zeros(1, dtype=torch.int32)
    hidden = torch.empty_like(x, dtype=operand)
    precision = Precision(x.dtype, operand, operand, x.dtype)
    load_host_module(CPU.hidden(precision, activation)).call(
        "hidden",
        {
            "encoder": x,
            "predictor": torch.full_like(x, -0.0),
            "packed_pitch": len(x),
            "frame": row,
            "state": row,
            "hidden": hidden,
            "hidden_pitch": len(x),
            "row_count": 1,
            "joint_dim": len(x),
        },
    )
    return hidden


def run_derivative(x: Tensor, activation: str) -> Tensor:
    """act'(x), through one row of gradients of hidden states."""
    row = torch.zeros(1, dtype=torch.int32)
    sums = torch.zeros_like(x)
    precision = Precision(x.dtype, x.dtype, x.dtype, x.dtype)
    load_host_module(CPU.joint_gradient(precision, activation)).call(
        "joint_gradient",
        {
            "d_hidden": torch.ones_like(x),
            "hidden": run_hidden(x, activation, x.dtype),
            "encoder": x,
            "predictor": torch.full_like(x, -0.0),
            "frame": row,
            "state": row,
            "encoder_sums": sums,
            "predictor_sums": None,
            "joint_dim": len(x),
            "row_count": 1,
        },
    )
    return sums


def sigmoid(x: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    return 1 / (1 + np.exp(-x))


def density(x: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    return np.exp(-x * x / 2) / np.sqrt(8 * np.arctan(np.longdouble(1)))


def distribution(x: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    """Of the standard normal: Marsaglia's series in the middle, Laplace's continued fraction in the
    tails."""
    middle, tail = np.clip(x, -3, 3), np.clip(np.abs(x), 3, 200)
    term = total = middle
    for k in range(3, 100, 2):
        term = term * middle * middle / k
        total = total + term
    fraction = tail
    for k in range(100, 0, -1):
        fraction = tail + k / fraction
    tail = density(tail) / fraction
    outside = np.where(x < 0, tail, 1 - tail)
    return np.where(np.abs(x) < 3, 0.5 + density(middle) * total, outside)


SMOOTH = {
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
    "silu": (lambda x: x * sigmoid(x), lambda x: sigmoid(x) * (1 + x * sigmoid(-x))),
    "gelu": (lambda x: x * distribution(x), lambda x: distribution(x) + x * density(x)),
}


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("dtype", REALS)
def test_smooth_activations(dtype: torch.dtype, activation: str) -> None:
    x = sweep(dtype, 40.0 if dtype == torch.float64 else 20.0)
    x = x[:: 16 if activation == "gelu" else 1].clone()  # whose truth takes long
    y, slope = run_hidden(x, activation, dtype), run_derivative(x, activation)
    numbers = x.isfinite()
    for at in (~numbers).nonzero().squeeze(1):
        # One at a time: on some CPUs torch's vectors have a NaN as gelu of infinity.
        leaf = x[at, None].clone().requires_grad_()
        of_torch = activate(leaf, activation)
        (slope_of_torch,) = torch.autograd.grad(of_torch.sum(), leaf)
        assert y[at].isnan() == of_torch.isnan()
        assert slope[at].isnan() == slope_of_torch.isnan()
    x, y, slope = x[numbers], y[numbers], slope[numbers]
    assert y.isfinite().all()
    assert slope.isfinite().all()
    function, derivative = SMOOTH[activation]
    with np.errstate(over="ignore", invalid="ignore"):
        truth = function(wide(x))
        slope_truth = derivative(wide(x))
    if activation in ("silu", "gelu"):  # products, of a factor that is zero below normal numbers
        lost = 1000 * torch.finfo(dtype).smallest_normal
        assert torch.equal(y.signbit(), x.signbit())
        truth = np.where(np.abs(wide(y) - truth) <= lost, wide(y), truth)
        in_middle = np.abs(x.numpy()) < 3
        assert ulps(y, truth).max() <= 6
        assert ulps(y, truth)[in_middle].max() <= 4
        assert ulps(y, truth)[in_middle].mean() <= 0.6
    else:
        assert ulps(y, truth).max() <= 3
    assert np.abs(wide(slope) - slope_truth).max() <= 4 * torch.finfo(dtype).eps
    if activation == "tanh":
        assert torch.equal(y.signbit(), x.signbit())
        assert (y.abs() <= 1).all()
    elif activation == "sigmoid":
        assert ((y >= 0) & (y <= 1)).all()


@pytest.mark.parametrize(
    "activation", ["relu", "identity", "leaky_relu", "leaky_relu(-2)", "hardtanh(-0.5, 3)"]
)
@pytest.mark.parametrize("dtype", REALS)
def test_piecewise_linear_activations(dtype: torch.dtype, activation: str) -> None:
    x = sweep(dtype, 10.0)
    leaf = x.clone().requires_grad_()
    expected = activate(leaf, activation)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(run_hidden(x, activation, dtype), expected.detach(), **exactly)
    numbers = ~x.isnan()  # NaN's slope is 0 or 1, in torch by its place
    torch.testing.assert_close(run_derivative(x, activation)[numbers], slope[numbers], **exactly)


def score_arguments(
    logits: Tensor, columns: Tensor, scores: Tensor, normalize: bool = True
) -> dict[str, Any]:
    """Of symbol_scores, for rows of one state."""
    rows, vocab_size = logits.shape
    return {
        "logits": logits,
        "pitch": logits.stride(0),
        "column_stride": logits.stride(1),
        "frame_place": None,
        "state_place": None,
        "bias": None,
        "tokens": vocab_size,
        "frame": torch.zeros(rows, dtype=torch.int32),
        "state": torch.zeros(rows, dtype=torch.int32),
        "columns": columns,
        "scores": scores,
        "others": None,
        "row_count": rows,
        "normalize": int(normalize),
    }


def gradient_arguments(gradient: Tensor, occupancy: Tensor) -> dict[str, Any]:
    """What logit_gradient takes besides."""
    return {
        "gradient": gradient,
        "gradient_pitch": gradient.stride(0),
        "frame_target": None,
        "state_target": None,
        "column_count": gradient.shape[1],
        "node": torch.arange(len(gradient)),
        "frame_sample": torch.zeros(1, dtype=torch.int64),
        "weight": torch.ones(1, dtype=torch.float64),
        "occupancy": occupancy,
        "normalizers": None,
        "clamp": 0.0,
    }


def test_exponential() -> None:
    """A logit gradient with γ = 1 and normaliser 0 is e^x, or zero where that is too small."""
    alone = Topology((Symbol("blank"),), (Arc(1, 0, (0,)),))
    for dtype in REALS:
        x = sweep(dtype, 87.0 if dtype == torch.float32 else 708.0)
        x = x[~(x > 80)]
        logits = torch.cat((torch.zeros(1, dtype=dtype), x)).unsqueeze(0)
        zero = torch.zeros(1, 1, dtype=torch.float64)
        arguments = score_arguments(logits, zero.long(), zero)
        arguments |= gradient_arguments(logits, zero + 1)
        load_host_module(CPU.logit_gradient(dtype, dtype, alone)).call("logit_gradient", arguments)
        y = logits[0, 1:]
        assert torch.equal(y.isnan(), x.isnan())
        numbers = ~x.isnan()
        truth = np.exp(wide(x[numbers]))
        is_zero = truth < least_gradient(dtype)
        assert (y[numbers].numpy()[is_zero] == 0).all()
        assert ulps(y[numbers], truth)[~is_zero].max() <= 2
        assert logits[0, 0] == 0  # γ·p − γ at the symbol's own column


@pytest.mark.parametrize("dtype", [*REALS, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [2, 3, 7, 16, 17, 33, 40])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 50.0, 1e4, 1e30])
def test_log_softmax(dtype: torch.dtype, vocab_size: int, scale: float) -> None:
    """Scores of every column in turn, some logits −∞."""
    real = real_dtype(dtype)
    rows = 37
    logits = (torch.randn(rows, vocab_size, dtype=torch.float64) * scale).to(dtype)
    logits[::3, 1:] = logits[::3, 1:].masked_fill(
        torch.rand(logits[::3, 1:].shape) < 0.3, -torch.inf
    )
    truth = wide(logits) - wide(logits).max(1, keepdims=True)
    truth = truth - np.log(np.exp(truth).sum(1, keepdims=True))
    for column in range(vocab_size):
        columns = torch.tensor([[column, (column + 1) % vocab_size]])
        scores = torch.full((rows, 2), NAN, dtype=torch.float64)
        load_host_module(CPU.symbol_scores(dtype, RNNT)).call(
            "symbol_scores", score_arguments(logits, columns, scores)
        )
        torch.testing.assert_close(
            scores,
            torch.from_numpy(truth[:, columns[0].numpy()].astype(np.float64)),
            rtol=4 * torch.finfo(torch.float64).eps,
            atol=4 * torch.finfo(real).eps,
        )


def test_rounding_to_bfloat16() -> None:
    """To the nearest, ties to even, around every bfloat16; some CPUs have only normal ones."""
    patterns = torch.arange(2**16, dtype=torch.int64) << 16
    beside = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (patterns.unsqueeze(1) + beside).flatten()
    x = x.where(x < 2**31, x - 2**32).int().view(torch.float32)
    rounded = run_hidden(x, "identity", torch.bfloat16)
    assert torch.equal(rounded.isnan(), x.isnan())
    numbers = ~x.isnan()
    expected = x.to(torch.bfloat16)
    is_zero = (x.abs() < torch.finfo(torch.float32).tiny) & (rounded == 0)
    expected = expected.where(~is_zero, torch.copysign(torch.zeros_like(expected), expected))
    assert torch.equal(rounded[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_float16() -> None:
    """Every one is read exactly, and what lies around every one is rounded to the nearest, ties to
    even. Logits without a softmax go into scores as they are, and −γ into their gradient."""
    every = torch.arange(-(2**15), 2**15).short().view(torch.float16).unsqueeze(1)
    columns = torch.tensor([[0, -1]])
    scores = torch.empty(len(every), 2, dtype=torch.float64)
    arguments = score_arguments(every, columns, scores, normalize=False)
    load_host_module(CPU.symbol_scores(torch.float16, RNNT)).call("symbol_scores", arguments)
    torch.testing.assert_close(scores[:, 0], every[:, 0].double(), rtol=0, atol=0, equal_nan=True)

    finite = every[every.isfinite()].float()
    step = (finite.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**-14) * 2**-10
    half = step / 2
    beside = (half, half.nextafter(half * 2), half.nextafter(half * 0), half * 0.5)
    x = torch.cat([finite, *(finite + offset for offset in beside), torch.tensor([1e9, -1e9])])
    gradient = torch.full((len(x), 1), NAN, dtype=torch.float16)
    scores = torch.zeros(len(x), 2, dtype=torch.float64)
    arguments = score_arguments(gradient.clone(), columns, scores, normalize=False)
    occupancy = torch.stack([-x, torch.zeros_like(x)], 1).double()
    arguments |= gradient_arguments(gradient, occupancy)
    load_host_module(CPU.logit_gradient(torch.float16, torch.float16, RNNT)).call(
        "logit_gradient", arguments
    )
    torch.testing.assert_close(gradient[:, 0], x.half(), rtol=0, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [*REALS, torch.bfloat16])
def test_padding_of_logits_stays(dtype: torch.dtype, normalize: bool) -> None:
    """Rows end where they end, whatever the width of a vector."""
    for vocab_size in range(2, 40):
        rows = 5
        padded = torch.full((rows, vocab_size + 3), 7.0, dtype=dtype)
        padded[:, :vocab_size] = torch.randn(rows, vocab_size)
        logits = padded[:, :vocab_size]
        expected = logits.double().log_softmax(1) if normalize else logits.double()
        columns = torch.tensor([[vocab_size - 1, 0]])
        scores = torch.full((rows, 2), NAN, dtype=torch.float64)
        arguments = score_arguments(logits, columns, scores, normalize)
        load_host_module(CPU.symbol_scores(dtype, RNNT)).call("symbol_scores", arguments)
        torch.testing.assert_close(scores, expected[:, columns[0]], rtol=1e-6, atol=1e-6)
        logits[:] = 0.0
        arguments |= gradient_arguments(logits, torch.ones(rows, 2, dtype=torch.float64))
        load_host_module(CPU.logit_gradient(dtype, dtype, RNNT)).call("logit_gradient", arguments)
        assert (padded[:, vocab_size:] == 7.0).all()
        assert not padded.isnan().any()
