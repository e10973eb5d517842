"""Run-time compilation of kernels, for GPUs and for the CPU.

``source`` says what is compiled, a ``compiler`` makes a binary of it, ``cache`` keeps it under its
``key``, ``build`` joins these. ``cuda_compiler`` is NVRTC; ``cuda_module`` loads its cubins on a
device through ``driver`` and launches their kernels. ``host_compiler`` is the machine's C++
compiler; ``host_module`` opens its libraries and calls their kernels. Importing this loads no CUDA
library and runs no compiler.
"""

from rnnt_op.jit.cuda_module import CudaModule, Module, launching, load_module, load_modules
from rnnt_op.jit.errors import (
    ArgumentError,
    CaptureError,
    CompileError,
    CompilerNotFound,
    DriverError,
    JitError,
    LibraryError,
    SourceNotFound,
    UnsupportedArchitecture,
)
from rnnt_op.jit.host_module import HostModule, load_host_module, load_host_modules
from rnnt_op.jit.signature import Argument, Arguments
from rnnt_op.jit.source import KernelSource

__all__ = [
    "Argument",
    "ArgumentError",
    "Arguments",
    "CaptureError",
    "CompileError",
    "CompilerNotFound",
    "CudaModule",
    "DriverError",
    "HostModule",
    "JitError",
    "KernelSource",
    "LibraryError",
    "Module",
    "SourceNotFound",
    "UnsupportedArchitecture",
    "launching",
    "load_host_module",
    "load_host_modules",
    "load_module",
    "load_modules",
]
