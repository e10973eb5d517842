"""What only a GPU can show: streams, threads, synchronisation, compilation, sanitizers.

The CPU suite runs on the GPU too, wherever a test is marked ``every_backend``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import fields, replace

import pytest
import torch
from problems import JointProblem, loss_and_gradients, random_joint, relative_error
from torch import Tensor

import rnnt_op
from rnnt_op.backends.kernels import USUAL
from rnnt_op.backends.sources import CUDA
from rnnt_op.jit.signature import signatures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Result = tuple[Tensor, tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def free_choice_of_algorithms(nan_filled_memory: None) -> None:
    """Users do not ask for deterministic algorithms; the op is deterministic all the same."""
    torch.use_deterministic_algorithms(False)


def on_device(problem: JointProblem, device: str, lengths_device: str = "cpu") -> JointProblem:
    """A copy of a problem whose differentiable tensors are leaves on the device."""
    moved = {}
    for field in fields(problem):
        value = getattr(problem, field.name)
        if isinstance(value, Tensor):
            target = lengths_device if field.name.endswith("lengths") else device
            moved[field.name] = value.detach().to(target)
    problem = replace(problem, **moved)
    for tensor in problem.differentiable:
        tensor.requires_grad_()
    return problem


def cuda_problem(dtype: torch.dtype = torch.float32, lengths_device: str = "cpu") -> JointProblem:
    problem = random_joint(6, 60, 20, joint_dim=40, vocab_size=70, dtype=dtype)
    return on_device(problem, "cuda", lengths_device)


def run(problem: JointProblem, reduction: str = "mean", **options: object) -> Result:
    return loss_and_gradients(
        rnnt_op.joint_rnnt_loss, problem, reduction=reduction, workspace_bytes=2**20, **options
    )


def assert_bitwise_equal(actual: Result, expected: Result) -> None:
    for a, e in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("lengths_device", ["cpu", "cuda"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cuda_equals_cpu(lengths_device: str, reduction: str) -> None:
    problem = random_joint(4, 30, 12)
    expected = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, reduction=reduction)
    moved = on_device(problem, "cuda", lengths_device)
    actual = loss_and_gradients(rnnt_op.joint_rnnt_loss, moved, reduction=reduction)
    assert relative_error([actual[0].cpu()], [expected[0]]) <= 1e-12
    assert relative_error([g.cpu() for g in actual[1]], expected[1]) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeated_runs_are_bitwise_equal(dtype: torch.dtype, reduction: str) -> None:
    problem = cuda_problem(dtype)
    first = run(problem, reduction)
    for _ in range(5):
        assert_bitwise_equal(run(problem, reduction), first)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_side_stream(reduction: str) -> None:
    """Work is ordered with the current stream alone, whatever the default stream does."""
    problem = cuda_problem()
    expected = run(problem, reduction)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda._sleep(200_000_000)  # on the default stream: a kernel there would come too late
    with torch.cuda.stream(stream):
        actual = run(problem, reduction)
        stream.synchronize()
        assert_bitwise_equal(actual, expected)


def test_threads() -> None:
    """Two threads, each on its own stream, at once."""
    problems = [cuda_problem(), cuda_problem(torch.bfloat16)]
    expected = [run(problem, "none") for problem in problems]
    torch.cuda.synchronize()
    actual: list[Result | None] = [None, None]

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(5):
                actual[i] = run(problems[i], "none")
            stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(actual, expected, strict=True):
        assert got is not None
        assert_bitwise_equal(got, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device() -> None:
    problem = random_joint(4, 30, 12)
    expected = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    torch.cuda.set_device(0)
    actual = loss_and_gradients(rnnt_op.joint_rnnt_loss, on_device(problem, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in (actual[0], *actual[1]))
    assert relative_error([g.cpu() for g in actual[1]], expected[1]) <= 1e-10


@pytest.mark.parametrize(("lengths_device", "synchronisations"), [("cpu", 0), ("cuda", 1)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_synchronisations(lengths_device: str, synchronisations: int, reduction: str) -> None:
    """None but the one that brings lengths to the host, in each op that reads them."""
    problem = cuda_problem(lengths_device=lengths_device)
    run(problem, reduction)
    ops = 2 if reduction == "none" else 1
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(problem, reduction)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    messages = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(messages) == ops * synchronisations, messages


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    """Compiled into one graph; CUDA graphs leave the op out."""
    problem = cuda_problem()

    def step(encoder: Tensor, predictor: Tensor, *rest: Tensor) -> Tensor:
        return rnnt_op.joint_rnnt_loss(encoder * 2, predictor * 2, *rest) * 3

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    expected = torch.autograd.grad(step(*problem.arguments), problem.differentiable)
    for _ in range(4):  # graphs would be recorded in the second run and replayed in the third
        loss = compiled(*problem.arguments)
        actual = torch.autograd.grad(loss, problem.differentiable)
        assert relative_error(actual, expected) <= 1e-6


def test_capture_is_refused() -> None:
    problem = cuda_problem()
    run(problem)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
        torch.cuda.graph(graph),
    ):
        rnnt_op.joint_rnnt_loss(*problem.arguments)


def test_bad_label_on_the_device_is_found() -> None:
    """With lengths on the CPU, by a device-side assertion; so in a process of its own."""
    code = (
        "import torch, rnnt_op\n"
        "x = torch.zeros(1, 2, 4, device='cuda')\n"
        "rnnt_op.joint_rnnt_loss(x, x, x[0, :1].expand(3, 4), None,"
        " torch.tensor([[7]], device='cuda'), torch.tensor([2]), torch.tensor([1]))\n"
        "torch.cuda.synchronize()\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode != 0
    assert "a label is not a token or equals blank" in process.stderr + process.stdout


SMALL_RUN = """
import torch, rnnt_op
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    leaf = lambda *shape: torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    tensors = leaf(3, 9, 20), leaf(3, 6, 20), leaf(13, 20), leaf(13)
    targets = torch.randint(1, 13, (3, 5), device="cuda")
    for reduction in ("mean", "none"):
        loss = rnnt_op.joint_rnnt_loss(*tensors, targets, torch.tensor([9, 1, 4]),
            torch.tensor([5, 2, 0]), reduction=reduction, workspace_bytes=20_000)
        torch.autograd.grad(loss.sum(), tensors)
    logits = leaf(3, 9, 6, 13)
    torch.autograd.grad(rnnt_op.rnnt_loss(logits, targets.int(), torch.tensor([9, 1, 4]).int(),
        torch.tensor([5, 2, 0]).int()), logits)
torch.cuda.synchronize()
print("done")
"""


def small_run(*prefix: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-c", SMALL_RUN],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_blocking_launches() -> None:
    process = small_run(CUDA_LAUNCH_BLOCKING="1")
    assert process.returncode == 0, process.stderr
    assert process.stdout == "done\n"


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    # Only kernels of this package: torch's own are not ours to judge. Without torch's caching
    # allocator every tensor has bounds of its own. Not initcheck: the padding of rows is read with
    # them, and never used.
    kernels = [
        option
        for source in CUDA.needed(USUAL)
        for name in signatures(source)
        for option in ("--kernel-name", f"kernel_substring={name}")
    ]
    process = small_run(
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        *kernels,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    assert "done" in process.stdout
