"""Peak memory: the workspace bounds it, whatever the batch is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from tested_backends import EAGER, EMULATOR, NATIVE

from rnnt_op.memory import batched_bytes

MIB = 2**20

PEAK = """
import sys
import torch
import rnnt_op

name, *sizes = sys.argv[1:]
batch, frames, labels, joint_dim, vocab_size, workspace = map(int, sizes)
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

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

run(*problem(1, 4, 2))
inputs = problem(batch, frames, labels)
before = status("VmRSS")
gradients = run(*inputs)
print(status("VmHWM") - before - sum(g.nbytes for g in gradients))
"""


def peak_bytes(backend: str, batch: int, *, workspace: int) -> int:
    arguments = map(str, (backend, batch, 400, 60, 32, 512, workspace))
    command = [sys.executable, "-c", PEAK, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(process.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [NATIVE, EAGER, EMULATOR])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_does_not_grow_with_the_batch(backend: str) -> None:
    """One copy of these logits takes 190 and 763 MiB."""
    workspace = 64 * MIB
    small, large = (peak_bytes(backend, batch, workspace=workspace) for batch in (4, 16))
    assert large <= workspace
    # Results of oneDNN's GEMMs come and go in malloc's heap, which keeps holes between them.
    assert large <= small + (32 if backend == "native" else 16) * MIB


def test_batched_bytes() -> None:
    rows = [
        f"B={b} T={t} U={u} V={v} H={h} {dtype}: {batched / 2**30:.2f} GiB"
        for b, t, u, v, h, dtype in (
            (1, 1000, 200, 1024, 64, torch.float32),
            (16, 1000, 200, 1024, 64, torch.float32),
            (16, 1000, 200, 1024, 64, torch.bfloat16),
            (1024, 1000, 200, 1024, 640, torch.bfloat16),
        )
        if (
            batched := batched_bytes(
                batch=b, frames=t, labels=u, vocab_size=v, joint_dim=h, dtype=dtype
            )
        )
    ]
    assert_expected_inline(
        "\n".join(rows),
        """\
B=1 T=1000 U=200 V=1024 H=64 torch.float32: 2.35 GiB
B=16 T=1000 U=200 V=1024 H=64 torch.float32: 37.57 GiB
B=16 T=1000 U=200 V=1024 H=64 torch.bfloat16: 31.05 GiB
B=1024 T=1000 U=200 V=1024 H=640 torch.bfloat16: 2208.25 GiB""",
    )
