"""Every kernel, dtype and activation compiles for every architecture, within its registers."""

from pathlib import Path

import pytest
import torch

from rnnt_op import topologies
from rnnt_op.backends.cuda_sources import kernel_sources, lattice_threads
from rnnt_op.jit import CompilerNotFound
from rnnt_op.jit.cuda_compiler import CudaCompiler, compiler_version
from rnnt_op.precompile import precompile, precompile_sources
from rnnt_op.validation import ACTIVATIONS, FLOAT_DTYPES

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]
TOPOLOGIES = {
    "modified": topologies.modified(),
    "constrained": topologies.constrained(),
    "multi-blank": topologies.multi_blank(),
    "tdt": topologies.tdt(),
    "tdt-9": topologies.tdt(range(9)),
    "hat": topologies.hat(),
    "hat-constrained": topologies.hat(topologies.constrained()),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        compiler_version()
    except CompilerNotFound as error:
        pytest.skip(str(error))
    monkeypatch.setenv("RNNT_OP_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills(architecture: str) -> None:
    compiled = precompile(architectures=[architecture])
    listed = {
        (source.name, source.macros)
        for dtype in FLOAT_DTYPES
        for activation in ACTIVATIONS
        for source in kernel_sources(dtype, activation)
    }
    assert {(kernel.name, kernel.macros) for kernel in compiled} == listed
    assert {kernel.name for kernel in compiled} == {
        path.stem for path in (Path(__file__).parent.parent / "csrc").glob("*.cu")
    }
    assert not any(kernel.cached for kernel in compiled)
    assert [kernel for kernel in compiled if kernel.spill_bytes] == []
    # 65,536 registers: two blocks of 256 threads on a multiprocessor, or one of 1,024.
    for kernel in compiled:
        assert 0 < (kernel.registers or 0) <= (64 if kernel.name == "lattice" else 128), kernel


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90a", "sm_120"])
def test_other_topologies(architecture: str, topology: str) -> None:
    """Registers suffice for a block, and what little is spilled is not of a loop over a row."""
    tables = TOPOLOGIES[topology]
    for dtype in (torch.float64, torch.bfloat16):
        sources = kernel_sources(dtype, "tanh", tables)
        for kernel in precompile_sources(sources, [CudaCompiler(architecture)]):
            threads = lattice_threads(tables) if kernel.name == "lattice" else 512
            assert 0 < (kernel.registers or 0) * threads <= 65536, kernel
            assert (kernel.spill_bytes or 0) <= 512, kernel
