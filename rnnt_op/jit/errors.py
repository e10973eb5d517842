"""What can go wrong between a kernel's source and its launch or call."""

from __future__ import annotations


class JitError(RuntimeError):
    """Any failure to compile, load, launch or call a kernel."""


class SourceNotFound(JitError):
    """A kernel source, or a header that one includes, is not among the package's sources."""


class CompilerNotFound(JitError):
    """A C++ compiler, or NVRTC, or cuda-python that reaches it, is not installed."""


class UnsupportedArchitecture(JitError):
    """The compiler, or this package, makes no code for that GPU."""


class CompileError(JitError):
    """The compiler refused a source or its flags; the message holds its log."""


class LibraryError(JitError):
    """A compiled library could not be opened in this process."""


class ArgumentError(JitError):
    """There is no such kernel, or arguments do not fit it, its device or eight bytes each."""


class CaptureError(JitError):
    """A module was needed first while a CUDA graph was being captured."""


class DriverError(JitError):
    """The CUDA driver is missing or refused a call.

    Args:
        message: holds the driver's own name and words for the error.
        code: that name, such as ``CUDA_ERROR_NO_DEVICE``; None if there is no driver.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code
