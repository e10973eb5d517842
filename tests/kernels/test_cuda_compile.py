"""Every kernel, dtype and activation compiles for every architecture, within its registers."""

from pathlib import Path

import pytest
import torch
from places import ROOT

from rnnt_op import topologies
from rnnt_op.activations import ACTIVATIONS
from rnnt_op.backends.kernels import Kernels, variants
from rnnt_op.backends.lattice_walk import max_threads
from rnnt_op.backends.sources import CUDA
from rnnt_op.jit import CompilerNotFound
from rnnt_op.jit.cuda_compiler import CudaCompiler, compiler_version
from rnnt_op.precompile import precompile, precompile_sources
from rnnt_op.topology import RNNT
from rnnt_op.validation import FLOAT_DTYPES

# Those between the oldest, the newest and the usual one take two dtypes each, each dtype twice.
DTYPES_OF = {
    "sm_75": FLOAT_DTYPES,
    "sm_80": (torch.float32, torch.bfloat16),
    "sm_86": (torch.float64, torch.float16),
    "sm_89": (torch.float32, torch.float16),
    "sm_90a": FLOAT_DTYPES,
    "sm_100": (torch.float64, torch.bfloat16),
    "sm_120": FLOAT_DTYPES,
}
ARCHITECTURES = list(DTYPES_OF)
OLDEST_AND_NEWEST = ["sm_75", "sm_90a", "sm_120"]
# The hardest whose derivatives follow from the value, and from the argument, on all; some others on each.
ACTIVATIONS_OF = {
    "sm_75": ["tanh", "gelu", "relu", "leaky_relu"],
    "sm_90a": ["tanh", "gelu", "sigmoid", "hardtanh"],
    "sm_120": ["tanh", "gelu", "identity", "silu"],
}
TOPOLOGIES = {
    "modified": topologies.modified(),
    "constrained": topologies.constrained(),
    "multi-blank": topologies.multi_blank(),
    "star": topologies.star(),
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


def test_every_activation_is_compiled() -> None:
    assert {name for names in ACTIVATIONS_OF.values() for name in names} == set(ACTIVATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills(architecture: str) -> None:
    # The first two of those that test_dropout takes, which has more to keep in registers.
    activations = ACTIVATIONS_OF.get(architecture, ["tanh"])[:2]
    dtypes = DTYPES_OF[architecture]
    compiled = precompile(dtypes=dtypes, architectures=[architecture], activations=activations)
    listed = {
        (source.name, source.macros)
        for dtype in dtypes
        for activation in activations
        for kernels in variants(dtype, activation, RNNT)
        for source in CUDA.needed(kernels)
    }
    assert {(kernel.name, kernel.macros) for kernel in compiled} == listed
    assert {kernel.name for kernel in compiled} == {
        path.stem for path in (ROOT / "csrc").glob("*.cu")
    }
    assert not any(kernel.cached for kernel in compiled)
    assert [kernel for kernel in compiled if kernel.spill_bytes] == []
    # 65,536 registers: two blocks of 256 threads on a multiprocessor, or one of 512 or 1,024.
    for kernel in compiled:
        of_block = 64 if kernel.name == "best_paths" else 128
        assert 0 < (kernel.registers or 0) <= of_block, kernel


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OLDEST_AND_NEWEST)
def test_dropout(architecture: str) -> None:
    sources = [
        source
        for dtype in FLOAT_DTYPES
        for activation in ACTIVATIONS_OF[architecture]
        for source in (
            CUDA.hidden(CUDA.precision("joint", dtype, dtype), activation, dropout=True),
            CUDA.hidden(CUDA.precision("joint", dtype, None), activation, dropout=True),
            CUDA.joint_gradient(CUDA.precision("joint", dtype, dtype), activation, dropout=True),
            CUDA.joint_gradient(CUDA.precision("joint", dtype, None), activation, dropout=True),
        )
    ]
    for kernel in precompile_sources(sources, [CudaCompiler(architecture)]):
        assert kernel.spill_bytes == 0, kernel
        assert 0 < (kernel.registers or 0) <= 128, kernel


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_other_topologies(topology: str) -> None:
    """Registers suffice for a block, and what little is spilled is not of a loop over a row."""
    tables = TOPOLOGIES[topology]
    architecture = OLDEST_AND_NEWEST[list(TOPOLOGIES).index(topology) % len(OLDEST_AND_NEWEST)]
    for dtype in (torch.float64, torch.bfloat16):
        usual, sources = (
            CUDA.needed(Kernels(dtype, each, input_dtype=dtype, activation="tanh"))
            for each in (RNNT, tables)
        )
        sources = [source for source in sources if source not in usual]
        for kernel in precompile_sources(sources, [CudaCompiler(architecture)]):
            threads = max_threads(tables) if kernel.name == "lattice" else 512
            assert 0 < (kernel.registers or 0) * threads <= 65536, kernel
            assert (kernel.spill_bytes or 0) <= 512, kernel


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OLDEST_AND_NEWEST)
def test_restricted_lattices(architecture: str) -> None:
    """Where a frame's nodes are takes registers, too."""
    first = OLDEST_AND_NEWEST.index(architecture)
    for tables in (RNNT, *list(TOPOLOGIES.values())[first::3]):
        source = CUDA.lattice(tables, restricted=True)
        (kernel,) = precompile_sources([source], [CudaCompiler(architecture)])
        assert 0 < (kernel.registers or 0) * max_threads(tables) <= 65536, kernel
        assert (kernel.spill_bytes or 0) <= (0 if tables is RNNT else 1024), kernel


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_best_paths(architecture: str) -> None:
    first = ARCHITECTURES.index(architecture)
    tables = RNNT, *list(TOPOLOGIES.values())[first :: len(ARCHITECTURES)]
    sources = [CUDA.best_paths(topology) for topology in tables]
    for kernel in precompile_sources(sources, [CudaCompiler(architecture)]):
        assert 0 < (kernel.registers or 0) <= 64, kernel  # for a block of 1,024 threads
        assert kernel.spill_bytes == 0, kernel
