"""The compiler's library: cuda-python is imported, and NVRTC loaded, at the first use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rnnt_op.jit.concurrency import ForkGate
from rnnt_op.jit.errors import CompilerNotFound

# A child forked while another thread compiles inherits NVRTC's locks: it hung in 8 of 40 trials.
_gate = ForkGate()


@contextmanager
def nvrtc_library() -> Iterator[Any]:
    """``cuda.bindings.nvrtc``, while this process does not fork.

    Raises:
        CompilerNotFound: NVRTC or cuda-python is missing.
    """
    with _gate.inside():
        yield _load()


def _load() -> Any:
    try:
        import cuda.bindings
    except ImportError as error:
        raise CompilerNotFound(
            "cuda-python, which reaches the CUDA compiler NVRTC, is not installed: "
            "pip install cuda-python nvidia-cuda-nvrtc"
        ) from error
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        version = cuda.bindings.__version__
        major = int(version.split(".")[0])
        package = "nvidia-cuda-nvrtc" if major >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
        raise CompilerNotFound(
            f"cuda-python {version} finds no NVRTC {major}, the CUDA run-time compiler: "
            f"pip install {package}, or install CUDA {major}'s toolkit where the linker finds it "
            f"or CUDA_HOME points ({' '.join(str(error).split())})"
        ) from error
    return nvrtc
