"""The native backend as a whole: against torch operations, over threads, and without a compiler.

``test_kernels`` has each of its kernels, ``test_native_functions`` their arithmetic, and
``test_native_builds`` other vector widths and sanitizers.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import ROOT, TESTS
from problems import JointProblem, loss_and_gradients, random_joint, relative_error
from tested_backends import NEEDS_CXX, cpu_backend
from torch import Tensor

import rnnt_op
from rnnt_op import backends
from rnnt_op.activations import ACTIVATIONS
from rnnt_op.backends import eager
from rnnt_op.backends.cpu_device import CpuDevice
from rnnt_op.backends.gemm import CpuMatrices
from rnnt_op.backends.kernels import Kernels
from rnnt_op.backends.records import JointStates, JointSums, Logits
from rnnt_op.backends.sources import CPU, real_dtype
from rnnt_op.jit import host_module, load_host_module
from rnnt_op.nodes import Nodes, pack_nodes
from rnnt_op.plan import Group
from rnnt_op.topology import RNNT

Result = tuple[Tensor, tuple[Tensor, ...]]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(problem: JointProblem, backend: str = "native", **options: object) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        served = cpu_backend(backend)
        patch.setitem(backends.BACKENDS, "cpu", lambda device: served)
        return loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, **options)


def pack(lengths: list[tuple[int, int]], vocab_size: int = 2) -> Nodes:
    group = Group(
        tuple(range(len(lengths))), tuple(t for t, _ in lengths), tuple(u + 1 for _, u in lengths)
    )
    targets = torch.randint(1, vocab_size, (len(lengths), max(u for _, u in lengths)))
    return pack_nodes(group, targets, cpu_backend("native"))


# ---- against torch operations


@dataclass(frozen=True)
class Drawn:
    """A problem in words, so that a failing one can be read."""

    seed: int
    lengths: list[tuple[int, int]]
    joint_dim: int
    vocab_size: int
    bias: bool
    blank: int
    dtype: torch.dtype
    indices: torch.dtype
    lengths_dtype: torch.dtype
    scale: float
    poisoned: bool
    spoilt: str | None
    options: dict[str, object]

    def problem(self) -> JointProblem:
        torch.manual_seed(self.seed)
        lengths = [(t, u if self.vocab_size > 1 else 0) for t, u in self.lengths]
        problem = random_joint(
            len(lengths),
            max(t for t, _ in lengths),
            max(u for _, u in lengths),
            joint_dim=self.joint_dim,
            vocab_size=self.vocab_size,
            bias=self.bias,
            blank=self.blank % self.vocab_size - self.vocab_size * (self.blank < 0),
            dtype=self.dtype,
            lengths=lengths,
            scale=self.scale,
        )
        problem = replace(
            problem,
            targets=problem.targets.to(self.indices),
            encoder_lengths=problem.encoder_lengths.to(self.lengths_dtype),
            target_lengths=problem.target_lengths.to(self.lengths_dtype),
        )
        if self.poisoned:
            problem = problem.poisoned()
        with torch.no_grad():
            if self.spoilt in ("nan", "inf"):
                problem.predictor[-1, 0, -1] = float(self.spoilt)
            elif self.spoilt == "token" and problem.bias is not None:
                problem.bias[self.seed % self.vocab_size] = -torch.inf
        return problem


def choice(*values: object) -> st.SearchStrategy[object]:
    return st.sampled_from(values)


DRAWN = st.builds(
    Drawn,
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4),
    joint_dim=st.integers(1, 70),
    vocab_size=st.integers(1, 70),
    bias=st.booleans(),
    blank=st.integers(-70, 70),
    dtype=choice(*DTYPES),
    indices=choice(torch.int32, torch.int64),
    lengths_dtype=choice(torch.int32, torch.int64),
    scale=choice(0.1, 0.5, 1.0),
    poisoned=st.booleans(),
    spoilt=choice(None, None, None, "nan", "inf", "token"),
    options=st.fixed_dictionaries(
        {
            "activation": choice(*ACTIVATIONS),
            "reduction": choice("none", "mean", "sum"),
            "gradient_tolerance": choice(0.0, None),
            "zero_infinity": st.booleans(),
            "workspace_bytes": choice(None, 1, 20_000),
        }
    ),
)


@NEEDS_CXX
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(DRAWN)
def test_no_worse_than_torch_operations(drawn: Drawn) -> None:
    joint, options = drawn.problem(), drawn.options
    loss, gradients = run(joint, **options)
    eager_loss, eager_gradients = run(joint, "eager", **options)
    true_loss, true_gradients = run(joint.to(torch.float64), "eager", **options)
    dtype = joint.encoder.dtype
    # In float64 the other is no truth: it rounds as much, and tanh's derivative near 1 even more.
    allowed = 1e-9 if dtype == torch.float64 else 64 * torch.finfo(dtype).eps
    for actual, expected, truth in (
        ([loss], [eager_loss], [true_loss]),
        (gradients, eager_gradients, true_gradients),
    ):
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a.isnan(), e.isnan())
            assert torch.equal(a.isinf(), e.isinf())
        actual, expected, truth = map(finite_part, (actual, expected, truth))
        if sum(float(t.square().sum()) for t in truth) <= 1e-20:  # rounding errors of zero
            assert all(a.abs().max() <= 1e-3 for a in actual if a.numel())
        else:
            error, eager_error = (relative_error(x, truth) for x in (actual, expected))
            assert error <= 2 * eager_error + allowed


def finite_part(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double().where(t.isfinite(), 0.0) for t in tensors]


@NEEDS_CXX
@pytest.mark.parametrize("lengths", [[(2000, 3)], [(3, 900)], [(700, 1), (1, 700), (90, 90)]])
@pytest.mark.parametrize("score", [-1.0, -1e4])
def test_long_lattices(lengths: list[tuple[int, int]], score: float) -> None:
    """Of a path of probability e^(−10⁷), which no double holds."""
    nodes = pack(lengths)
    scores = torch.rand(len(nodes.rows), 2, dtype=torch.float64) + score
    last = nodes.packed.states[nodes.sample_of(nodes.rows)] - 1
    is_last = nodes.packed.state_index[nodes.rows.state.long()] == last
    scores[:, 1].masked_fill_(is_last, -torch.inf)
    actual = cpu_backend("native").forward_backward(RNNT, nodes, scores, occupancies=True)
    expected = eager.forward_backward(RNNT, nodes, scores, occupancies=True)
    torch.testing.assert_close(
        actual.log_likelihood, expected.log_likelihood, rtol=1e-13, atol=1e-12
    )
    assert score > -1e4 or actual.log_likelihood.min() < -7e6
    # A logarithm of 10⁷ rounds to 10⁻⁹.
    allowed = 1e-11 + 2**-48 * float(actual.log_likelihood.abs().max())
    torch.testing.assert_close(actual.occupancy, expected.occupancy, rtol=allowed, atol=1e-14)


# ---- threads


def kernel_results(dtype: torch.dtype) -> list[Tensor]:
    """What every kernel computes, of many tasks each; no GEMM but with an identity."""
    torch.manual_seed(0)
    backend = cpu_backend("native")
    nodes = pack([(60, 9), (1, 0), (70, 30), (5, 50)], 77)
    packed, n, width = nodes.packed, len(nodes.rows), 77
    weight = torch.eye(width, dtype=dtype)
    chunk = backend.joint_chunk(
        weight, None, activation="tanh", input_dtype=dtype, compute_dtype=dtype
    )
    chunk.allocate(n)
    real = real_dtype(dtype)
    encoder = torch.randn(len(packed.frame_sample), width, dtype=real)
    predictor = torch.randn(len(packed.state_sample), width, dtype=real)
    sums = JointSums(chunk.zeros(len(encoder)), chunk.zeros(len(predictor)), None, None)
    states = JointStates(packed, encoder, predictor, sums)
    logits = chunk.logits(states, nodes.rows)
    results = [nodes.rows.frame, nodes.rows.state, logits.values.clone()]
    columns = RNNT.columns(packed.next_label, 0, width)
    scores = torch.empty(n, 2, dtype=torch.float64)
    copied = Logits(logits.values.clone(), None, dtype)
    backend.symbol_scores(RNNT, copied, columns, nodes.rows, True, scores)
    lattice = backend.forward_backward(RNNT, nodes, scores, occupancies=True)
    assert lattice.occupancy is not None
    weight = torch.randn(4, dtype=torch.float64)
    kept = backend.select_nodes(
        RNNT, nodes, scores, lattice.occupancy, weight=weight, tolerance=1e-3, least=1e-20
    )()
    rows = nodes.rows.at(kept)
    gradient = backend.logit_gradient_(
        RNNT,
        chunk.logits(states, rows),
        columns,
        rows,
        kept,
        nodes,
        scores,
        lattice.occupancy,
        weight,
        normalize=True,
        clamp=0.3,
    )
    results += [scores, lattice.log_likelihood, lattice.occupancy, kept.clone(), gradient.clone()]
    chunk.backward(states, rows, gradient)
    assert sums.encoder_rows is not None
    assert sums.predictor_rows is not None
    return [*results, sums.encoder_rows, sums.predictor_rows]


def all_modules(dtype: torch.dtype) -> list[host_module.HostModule]:
    kernels = Kernels(dtype, input_dtype=dtype, activation="tanh")
    return [load_host_module(source) for source in CPU.needed(kernels)]


@NEEDS_CXX
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_kernels_are_the_same_on_any_threads(dtype: torch.dtype, count: int) -> None:
    """Bit for bit: torch's threads, or those that kernels start where there is no OpenMP."""
    with threads(1):
        expected = kernel_results(dtype)
    with threads(count):
        of_torch = kernel_results(dtype)
        modules = all_modules(dtype)
        for module in modules:
            host_module._function(module._library, "use_parallel")(None)
        try:
            own = kernel_results(dtype)
        finally:
            for module in modules:
                host_module._function(module._library, "use_parallel")(
                    host_module.ctypes.c_void_p(host_module._gomp_parallel())
                )
    for actual in (of_torch, own):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)
            assert not a.double().isnan().any()


@NEEDS_CXX
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_losses_repeat(dtype: torch.dtype, count: int) -> None:
    """Bit for bit on as many threads, and to rounding on any."""
    problem = random_joint(5, 30, 12, joint_dim=33, vocab_size=70, dtype=dtype, scale=0.5)
    options = {"workspace_bytes": 500_000, "reduction": "none"}
    with threads(1):
        sequential = run(problem, **options)
    with threads(count):
        first = run(problem, **options)
        for _ in range(3):
            again = run(problem, **options)
            for a, e in zip((again[0], *again[1]), (first[0], *first[1]), strict=True):
                assert torch.equal(a, e)
    allowed = 8 * torch.finfo(dtype).eps
    assert relative_error([first[0]], [sequential[0]]) <= allowed
    assert relative_error(first[1], sequential[1]) <= allowed


@NEEDS_CXX
def test_python_threads_at_once() -> None:
    """Kernels run without the interpreter's lock, and share nothing."""
    drawn = [random_joint(3, 25, 10, joint_dim=24, vocab_size=60) for _ in range(4)]
    with threads(2):
        expected = [run(problem) for problem in drawn]
        results: dict[tuple[int, int], Result] = {}
        barrier = threading.Barrier(len(drawn))

        def work(index: int) -> None:
            torch.set_num_threads(2)
            barrier.wait()
            for repeat in range(5):
                results[index, repeat] = loss_and_gradients(rnnt_op.joint_rnnt_loss, drawn[index])

        workers = [threading.Thread(target=work, args=(i,)) for i in range(len(drawn))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(results) == 5 * len(drawn)
    for (index, _), (loss, gradients) in results.items():
        assert torch.equal(loss, expected[index][0])
        assert relative_error(gradients, expected[index][1]) <= 1e-13


# ---- other processes


PREAMBLE = """
import os, sys, warnings
import torch, rnnt_op
from problems import loss_and_gradients, random_joint

torch.manual_seed(0)
problem = random_joint(2, 9, 4, dtype=torch.float32)

def run():
    return loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
"""


def script(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    path = f"{TESTS}{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@NEEDS_CXX
def test_fork() -> None:
    """A child computes what its parent computed, which has loaded all kernels and used threads."""
    output = script("""
torch.set_num_threads(2)
expected = run()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    loss, gradients = run()
    same = torch.allclose(loss, expected[0]) and all(map(torch.allclose, gradients, expected[1]))
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
again = run()
print(torch.equal(again[0], expected[0]))
""")
    assert output.split() == ["0", "True"]


FALLBACK = """
from rnnt_op.backends import backend_for, eager
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = run(), run()
assert torch.equal(first[0], second[0])
assert backend_for(torch.device("cpu")) is eager
print("\\n".join(str(w.message) for w in caught if w.category is RuntimeWarning))
"""


def test_with_a_compiler_that_fails(tmp_path: Path) -> None:
    """Torch operations serve, and one warning says why and what helps."""
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    compiler.chmod(0o755)
    output = script(
        FALLBACK, CXX=str(compiler), CXXFLAGS="", RNNT_OP_CACHE_DIR=str(tmp_path / "cache")
    )
    assert_expected_inline(
        re.sub(" -std.*", " ...", output.replace(str(tmp_path), "...")),
        """\
rnnt_op: torch operations serve the CPU instead of compiled kernels, more slowly: the C++ compiler refuses its flags: .../broken ...
out of order
name another compiler in CXX, or other flags in CXXFLAGS
""",
    )


# ---- memory


@NEEDS_CXX
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_freed_memory_is_used_again() -> None:
    """The next call finds the pages of this one's 25 MiB in place: the system need not fault them
    in again, 2,000 to 7,000 for a call."""
    output = script("""
import resource
problem = random_joint(8, 100, 20, 256, 128, lengths=[(100, 20)] * 8, dtype=torch.float32)
torch.set_num_threads(1)
faults = []
for _ in range(7):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
""")
    assert sorted(map(int, output.split()))[3] < 500


# ---- few GEMM shapes


def test_gemm_shapes_are_few() -> None:
    """Whatever the numbers of nodes and kept nodes are."""
    precision = CPU.precision("joint", torch.float32, torch.float32)
    sizes = [CpuMatrices().rounded(rows, precision) for rows in range(1, 4097)]
    assert all(rows <= size <= rows * 9 / 8 for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 80

    met: set[tuple[int, ...]] = set()
    linear = CpuDevice.linear

    def recorded(device: CpuDevice, x: Tensor, *arguments: Any) -> Tensor:
        met.add(tuple(x.shape))
        return linear(device, x, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuDevice, "linear", recorded)
        for frames in range(100, 140):
            run(random_joint(1, frames, 9, lengths=[(frames, 9)], dtype=torch.float32))
    assert {rows for rows, _ in met} <= set(sizes)
