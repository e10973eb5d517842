"""Peak memory: the workspace bounds it, whatever the batch is, and the planner predicts it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from places import TESTS
from tested_backends import EAGER, EMULATOR, NATIVE, cpu_backend
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rnnt_op.memory import (
    METHODS,
    Workload,
    batched_bytes,
    cost,
    held,
    largest_batch,
    peak_bytes,
)
from rnnt_op.tools.study import methods
from rnnt_op.tools.study.cell import Cell, measure
from rnnt_op.tools.study.measure import FREED_AT_ONCE
from rnnt_op.tools.study.problems import Problem, random_joint

MIB = 2**20

PEAK = """
import sys
import torch
import rnnt_op

name, *sizes = sys.argv[1:]
batch, frames, labels, joint_dim, vocab_size, workspace = map(int, sizes)
from rnnt_op.tools.study.measure import resident_bytes
from tested_backends import cpu_backend
backend = cpu_backend(name)
rnnt_op.backends.BACKENDS["cpu"] = lambda device: backend

def problem(batch, frames, labels):
    leaf = lambda *shape: torch.randn(shape).requires_grad_()
    tensors = leaf(batch, frames, joint_dim), leaf(batch, labels + 1, joint_dim), \\
        leaf(vocab_size, joint_dim), leaf(vocab_size)
    return tensors, (torch.ones(batch, labels).long(), torch.full((batch,), frames),
        torch.full((batch,), labels))

def run(tensors, indices):
    loss = rnnt_op.joint_rnnt_loss(*tensors, *indices, workspace_bytes=workspace)
    return torch.autograd.grad(loss, tensors)

run(*problem(1, 4, 2))
inputs = problem(batch, frames, labels)
before = resident_bytes("VmRSS")
gradients = run(*inputs)
print(resident_bytes("VmHWM") - before - sum(g.nbytes for g in gradients))
"""


def measured_workspace(backend: str, batch: int, *, workspace: int) -> int:
    arguments = map(str, (backend, batch, 400, 60, 32, 512, workspace))
    command = [sys.executable, "-c", PEAK, *arguments]
    environment = {**os.environ, **FREED_AT_ONCE, "PYTHONPATH": str(TESTS)}
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(process.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [NATIVE, EMULATOR])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_does_not_grow_with_the_batch(backend: str) -> None:
    """One copy of these logits takes 381 and 1,144 MiB, of the hidden states 24 and 71 MiB. Eight
    samples already fill a chunk, and most of a group."""
    workspace = 64 * MIB
    small, large = (measured_workspace(backend, n, workspace=workspace) for n in (8, 24))
    assert large <= workspace
    # Scratch of oneDNN and of threads differs by up to 8 MiB from run to run.
    assert large <= small + 24 * MIB


def test_batched_bytes() -> None:
    rows = [
        f"B={b} T={t} U={u} V={v} H={h} {dtype}: {batched / 2**30:.2f} GiB"
        for b, t, u, v, h, dtype in (
            (1, 1000, 200, 1024, 64, torch.float32),
            (16, 1000, 200, 1024, 64, torch.float32),
            (16, 1000, 200, 1024, 64, torch.bfloat16),
            (1024, 1000, 200, 1024, 640, torch.bfloat16),
        )
        if (batched := batched_bytes(Workload(((t, u),) * b, v, h, dtype)))
    ]
    assert_expected_inline(
        "\n".join(rows),
        """\
B=1 T=1000 U=200 V=1024 H=64 torch.float32: 2.35 GiB
B=16 T=1000 U=200 V=1024 H=64 torch.float32: 37.57 GiB
B=16 T=1000 U=200 V=1024 H=64 torch.bfloat16: 37.19 GiB
B=1024 T=1000 U=200 V=1024 H=640 torch.bfloat16: 2600.83 GiB""",
    )


RAGGED = ((40, 12), (20, 6), (30, 3), (13, 11), (33, 12), (22, 7))


def problem_of(workload: Workload) -> Problem:
    torch.manual_seed(0)
    return random_joint(workload)


def bytes_of(problem: Problem) -> int:
    return sum(tensor.nbytes for tensor in (*problem.leaves, problem.targets))


def allocated_peak(run: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator had given out at once, beyond those before."""
    with profile(profile_memory=True) as recorded:
        run()
    sizes: list[tuple[int, int]] = []
    events = list(recorded.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag.name == "Allocation":
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = peak = 0
    for _, size in sorted(sizes, key=lambda at: at[0]):
        now += size
        peak = max(peak, now)
    return peak


# oneDNN's half GEMMs of this size have scratch of their own beyond torch's tensors.
@pytest.mark.parametrize(
    ("vocab_size", "joint_dim", "dtype", "names"),
    [
        (64, 32, torch.float32, METHODS[:-1]),
        (32, 128, torch.float32, METHODS[:-1]),
        (64, 32, torch.bfloat16, ("batched", "padding-free", "batch-split", "one at a time")),
    ],
    ids=["V=64-H=32", "V=32-H=128", "V=64-H=32-bfloat16"],
)
def test_model_is_what_torch_allocates(
    vocab_size: int, joint_dim: int, dtype: torch.dtype, names: tuple[str, ...]
) -> None:
    workload = Workload(RAGGED, vocab_size, joint_dim, dtype)
    problem = problem_of(workload)
    for name in names:
        method = methods.METHODS[name]
        method.gradients(problem)
        measured = bytes_of(problem) + allocated_peak(lambda m=method: m.gradients(problem))
        assert measured == pytest.approx(peak_bytes(name, workload), rel=0.05), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_is_bounded_by_the_model(dtype: torch.dtype) -> None:
    workload = Workload(RAGGED * 8, 64, 32, dtype)
    problem = problem_of(workload)
    for workspace in (2**20, 2**23):
        options = {"workspace_bytes": workspace}

        def run() -> object:
            return problem.gradients(methods.METHODS["rnnt_op"].function, **options)  # noqa: B023

        run()
        measured = bytes_of(problem) + allocated_peak(run)
        assert measured <= 1.05 * peak_bytes("rnnt_op", workload, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [NATIVE, EAGER, EMULATOR])
def test_backends_plan_what_their_chunks_have(name: str, dtype: torch.dtype) -> None:
    backend, weight = cpu_backend(name), torch.zeros(30, 20, dtype=dtype)
    for input_dtype in (dtype, None):
        dtypes: dict[str, Any] = {"input_dtype": input_dtype, "compute_dtype": dtype}
        chunk = backend.joint_chunk(weight, None, activation="tanh", **dtypes)
        planned = backend.joint_bytes(30, 20, **dtypes)
        assert (planned.row, planned.packed) == (chunk.row_bytes, chunk.packed_bytes)


def test_unknown_method() -> None:
    workload = Workload.uniform(1, 4, 2, vocab_size=8, joint_dim=4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"expected one of batched, .* rnnt_op, .* got 'fast'"):
        held("fast", workload)


def test_held() -> None:
    workload = Workload(((1000, 200), (600, 90)), 1024, 640, torch.bfloat16)
    # The expected text is written in ASCII alone.
    lines = [
        f"{name}: {tensor.name} {tensor.shape.replace('·', ' ')} {tensor.bytes / MIB:.2f}"
        for name in ("batched", "in-place", "one at a time", "rnnt_op")
        for tensor in held(name, workload, device="cuda")
        if tensor.bytes >= MIB
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
batched: encoder B T H 2.44
batched: weight V H 1.25
batched: hidden states B T (U+1) H 490.72
batched: log-softmax B T (U+1) V 1570.31
batched: d_log-softmax by blanks B T (U+1) V 1570.31
batched: d_log-softmax by labels B T (U+1) V 1570.31
in-place: encoder B T H 2.44
in-place: weight V H 1.25
in-place: hidden states B T (U+1) H 490.72
in-place: d_logits B T (U+1) V 785.16
in-place: d_hidden B T (U+1) H 490.72
in-place: d_weight V H 1.25
one at a time: encoder B T H 2.44
one at a time: weight V H 1.25
one at a time: d_encoder B T H 2.44
one at a time: sum of d_weight V H 2.50
one at a time: hidden states T (U+1) H 245.36
one at a time: log-softmax T (U+1) V 785.16
one at a time: d_log-softmax by blanks T (U+1) V 785.16
one at a time: d_log-softmax by labels T (U+1) V 785.16
rnnt_op: encoder B T H 2.44
rnnt_op: weight V H 1.25
rnnt_op: d_encoder B T H 2.44
rnnt_op: sum of d_weight V H 2.50
rnnt_op: chunk: logits, hidden states, d_hidden R (V+H) 248.00
rnnt_op: lattices in flight N_g 13.67
rnnt_op: their states and gradients (F_g+P_g) H 6.93
rnnt_op: d_weight of a chunk V H 2.50""",
    )


@pytest.mark.parametrize("name", METHODS)
def test_largest_batch(name: str) -> None:
    def workload_of(batch: int) -> Workload:
        return Workload.uniform(
            batch, 500, 100, vocab_size=512, joint_dim=256, dtype=torch.bfloat16
        )

    for memory in (2**30, 5 * 2**30):
        largest = largest_batch(name, workload_of, memory, device="cuda")
        assert peak_bytes(name, workload_of(largest), device="cuda") <= memory
        assert peak_bytes(name, workload_of(largest + 1), device="cuda") > memory
    assert largest_batch(name, workload_of, 2**20) == 0


@pytest.mark.parametrize("name", METHODS[:-1])
def test_gemm_flops(name: str) -> None:
    workload = Workload(RAGGED, 24, 16, torch.float32)
    problem = problem_of(workload)
    with FlopCounterMode(display=False) as counter:
        methods.METHODS[name].gradients(problem)
    assert cost(name, workload).gemm_flops == counter.get_total_flops()


def test_cost_of_selection() -> None:
    workload = Workload(RAGGED, 24, 16, torch.float32)
    score = 2 * 24 * 16 * sum(t * (u + 1) for t, u in RAGGED)
    assert cost("rnnt_op", workload, 0.0).gemm_flops == score
    assert cost("rnnt_op", workload, 0.25).gemm_flops == pytest.approx(1.5 * score)
    assert cost("rnnt_op", workload).gemm_flops == 3 * score
    # Without room for logits, on a GPU, or where few nodes are scored they are computed again.
    assert cost("rnnt_op", workload, workspace_bytes=1).gemm_flops == 4 * score
    assert cost("rnnt_op", workload, device="cuda").gemm_flops == 4 * score
    assert cost("rnnt_op", workload, 0.25, scored=0.5).gemm_flops == pytest.approx(1.25 * score)
    # All lattices are one group, α and β side by side.
    assert cost("rnnt_op", workload).sequential_steps == 40 + 12
    assert cost("batched", workload).sequential_steps == 2 * (40 + 12)
    steps = 2 * sum(t + u for t, u in RAGGED)
    assert cost("one at a time", workload).sequential_steps == steps


class Traffic(TorchDispatchMode):
    """Bytes of large tensors that operations other than GEMMs read and write."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.bytes = least, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if not function.is_view and name not in (
            "addmm",
            "mm",
            "detach",
            "_unsafe_view",
            "gather",
            "scatter_add",
        ):
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in tensors if t.numel() >= self.least)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_moved(dtype: torch.dtype) -> None:
    workload = Workload.uniform(3, 40, 12, vocab_size=64, joint_dim=48, dtype=dtype)
    problem = problem_of(workload)
    with Traffic(workload.padded_nodes * 48) as traffic:
        methods.METHODS["batched"].gradients(problem)
    assert traffic.bytes == pytest.approx(cost("batched", workload).bytes_moved, rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("method", "lengths"),
    [
        ("batched", ((250, 60),) * 2),
        ("in-place", ((250, 60), (200, 50), (150, 60), (250, 40))),
        ("rnnt_op", ((400, 2),) * 160),
    ],
)
def test_model_is_what_the_process_takes(
    method: str, lengths: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least 200 MB, beside which what the allocator keeps for itself is small."""
    for name, value in FREED_AT_ONCE.items():
        monkeypatch.setenv(name, value)
    workload = Workload(lengths, *((512, 256) if method != "rnnt_op" else (64, 512)), torch.float32)
    cell = Cell(
        method=method,
        workload=workload,
        device="cpu",
        memory_limit=2**32,
        time_limit=120.0,
        repeats=0,
        seed=0,
    )
    predicted = peak_bytes(method, workload)
    assert predicted >= 200e6
    assert measure(cell)[-1].peak_bytes == pytest.approx(predicted, rel=0.1)
