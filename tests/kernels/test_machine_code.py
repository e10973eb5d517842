"""What ptxas made of the kernels: rows move 16 bytes at a time, and nothing lies in local memory."""

from __future__ import annotations

import sys
from pathlib import Path

import jit_support
import pytest
import torch
from places import ROOT

from rnnt_op.backends.sources import CUDA
from rnnt_op.jit import KernelSource
from rnnt_op.topology import RNNT

nvrtc = jit_support.nvrtc
pytestmark = pytest.mark.usefixtures("nvrtc")

# Vectors that a lane has in flight in a step, by the operand's bytes.
LOADS = {
    "hidden": {4: 2, 2: 2},  # encoder and predictor
    "symbol_scores": {4: 8, 2: 8},  # logits and bias
    "logit_gradient": {4: 2, 2: 4},  # the same
    "joint_gradient": {4: 9, 2: 14},  # both factors of four rows, and the sum
}
STORES = {"hidden": {4: 1, 2: 1}, "logit_gradient": {4: 1, 2: 1}, "joint_gradient": {4: 1, 2: 2}}


@pytest.fixture
def nvdisasm(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from machine_code import find_nvdisasm

    path = find_nvdisasm()
    if path is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    return path


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("sm_80", torch.float32), ("sm_90a", torch.bfloat16)]
)
def test_machine_code(architecture: str, dtype: torch.dtype, nvdisasm: str) -> None:
    from machine_code import LOCAL, codes_of, sources_of

    seen = set()
    for source in sources_of(dtype, "tanh"):
        for code in codes_of(source, architecture, nvdisasm):
            seen.add(source)
            kernel, size = code.kernel, dtype.itemsize
            assert code.opcodes["EXIT"] > 0, kernel
            assert code.count(*LOCAL) == 0, kernel
            # The lattice's are one a scheduler; what they do not wait for, registers are for. The
            # largest blocks of joint_gradient are those of a few long sums.
            has_large_blocks = kernel in ("forward_backward", "joint_gradient")
            assert code.warps >= (16 if has_large_blocks else 24), kernel
            if kernel in LOADS:
                assert code.count("LDG.E.128") >= LOADS[kernel][size], kernel
                assert code.count("LDG.E.U16", "LDG.E.S16") == 0, kernel
            if kernel in STORES:
                assert code.count("STG.E.128") >= STORES[kernel][size], kernel
    assert {source.name for source in seen} == {p.stem for p in (ROOT / "csrc").glob("*.cu")}


def test_a_step_of_the_lattice_waits_for_little(nvdisasm: str) -> None:
    from lattice_steps import SCORES, cycles_of, loop_of

    loop = loop_of(CUDA.lattice(RNNT), "forward_backward", "sm_90a", nvdisasm)
    opcodes = [instruction.opcode for instruction in loop]
    steps = opcodes.count("SHFL") // 4
    assert steps == 2
    assert "BAR" not in opcodes
    assert len(loop) < 150 * steps
    cycles = {place: cycles_of(loop, latency) / steps for place, latency in SCORES.items()}
    assert cycles["L2"] < 300, cycles


def test_narrow_loads_and_local_memory_are_seen(nvdisasm: str, tmp_path: Path) -> None:
    from machine_code import LOCAL, codes_of

    for path in (ROOT / "csrc").glob("*.cu*"):
        text = path.read_text().replace("16 ? COUNT * sizeof(T) : 16)", "16 ? 4 : 4)")
        (tmp_path / path.name).write_text(text)
    hidden = CUDA.hidden(CUDA.precision("joint", torch.float32, torch.float32), "tanh")
    narrow = KernelSource("hidden", hidden.macros, root=tmp_path)
    (code,) = codes_of(narrow, "sm_90a", nvdisasm)
    assert code.count("LDG.E.128") == 0

    (tmp_path / "local.cu").write_text("""
        extern "C" __global__ void local(int* x, long long n) {
          int values[64];
          for (int i = 0; i < 64; ++i) values[i] = x[i];
          for (int i = 0; i < n; ++i) x[i] = values[x[i] & 63];
        }
    """)
    (code,) = codes_of(KernelSource("local", root=tmp_path), "sm_90a", nvdisasm)
    assert code.count(*LOCAL) > 0
