"""Run-time compilation of CUDA kernels.

``source`` says what is compiled, ``compiler`` makes a cubin of it, ``cache`` keeps it under its
``key``, ``build`` joins these; ``module`` loads a cubin on a device through ``driver`` and launches
its kernels with ``arguments``. Importing this loads no CUDA library.
"""

from rnnt_op.jit.arguments import Argument
from rnnt_op.jit.errors import (
    ArgumentError,
    CaptureError,
    CompileError,
    CompilerNotFound,
    DriverError,
    JitError,
    SourceNotFound,
    UnsupportedArchitecture,
)
from rnnt_op.jit.module import CudaModule, Module, load_module
from rnnt_op.jit.source import KernelSource

__all__ = [
    "Argument",
    "ArgumentError",
    "CaptureError",
    "CompileError",
    "CompilerNotFound",
    "CudaModule",
    "DriverError",
    "JitError",
    "KernelSource",
    "Module",
    "SourceNotFound",
    "UnsupportedArchitecture",
    "load_module",
]
