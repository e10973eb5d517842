"""Launches of emulated kernels."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from emulator.build import FOLDER, EmulatorError, build_kernels, build_scheduler
from rnnt_op.jit import Argument, KernelSource, Module
from rnnt_op.jit.cuda_module import ArgumentBlock

FREE_SHARED_BYTES = 48 * 1024
MAX_SHARED_BYTES = 227 * 1024  # of sm_90; the scheduler has room for no more
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)

_ORDERS = ("ascending", "descending", "shuffled")
_order: tuple[int, int] = (0, 0)  # index in _ORDERS, seed


class _Kernel(ctypes.Structure):  # emulator::Kernel of scheduler.h
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("parameters", ctypes.c_char_p),
        ("max_threads", ctypes.c_int),
        ("invoke", ctypes.c_void_p),
        ("touch_shared_memory", ctypes.c_void_p),
    )


class _Launch(ctypes.Structure):  # emulator::Launch
    _fields_ = (
        ("kernel", ctypes.POINTER(_Kernel)),
        ("arguments", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("order", ctypes.c_int),
    )


@cache
def _scheduler() -> Any:
    # Global: the libraries of kernels find its functions by name.
    library = ctypes.CDLL(str(build_scheduler()), mode=ctypes.RTLD_GLOBAL)
    library.emulator_launch.argtypes = [ctypes.POINTER(_Launch)]
    library.emulator_launch.restype = ctypes.c_char_p
    return library


@contextmanager
def thread_order(order: str) -> Iterator[None]:
    """Chooses which runnable thread continues, and which block is next, in the whole process.

    Args:
        order: "ascending" (the default) or "descending": always the lowest or highest one;
            "shuffled(seed)": a random one each time, the same in each launch.
    """
    global _order
    match = re.fullmatch(r"(ascending|descending|shuffled(?=\())(?:\((\d+)\))?", order)
    if match is None or (match[2] is not None) != (match[1] == "shuffled"):
        raise ValueError(f"order: expected ascending, descending or shuffled(seed), got {order!r}")
    previous, _order = _order, (_ORDERS.index(match[1]), int(match[2] or 0))
    try:
        yield
    finally:
        _order = previous


class EmulatedModule(Module):
    """The kernels of one source, compiled for the CPU at first use.

    Args:
        source: kernels and macros.
        checked: also stop at undefined behaviour that a GPU would not notice or answer otherwise;
            see ``build_kernels``.
        watched: also stop at races: accesses of one byte by two threads, one at least a write, that
            no barrier orders. In shuffled order, threads also take turns between accesses.
        max_shared_bytes: dynamic shared memory that a launch may ask for; more than 48 KiB stands
            for the permission that a GPU wants.

    Raises:
        EmulatorError: the source does not compile.
    """

    def __init__(
        self,
        source: KernelSource,
        *,
        checked: bool = True,
        watched: bool = False,
        max_shared_bytes: int = FREE_SHARED_BYTES,
    ) -> None:
        self._launch = _scheduler().emulator_launch
        self._path = build_kernels(source, checked=checked, watched=watched)
        self._max_shared_bytes = min(max_shared_bytes, MAX_SHARED_BYTES)
        list_kernels = ctypes.CDLL(str(self._path)).emulator_kernels
        list_kernels.restype = ctypes.POINTER(_Kernel)
        self._kernels: dict[str, Any] = {}
        entries = list_kernels()
        while name := entries[len(self._kernels)].name:
            self._kernels[name.decode()] = entries[len(self._kernels)]

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels, in the order of the source."""
        return tuple(self._kernels)

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Argument],
        shared_bytes: int = 0,
    ) -> None:
        """Runs a kernel on CPU tensors to its end; see ``rnnt_op.jit.Module``.

        Raises:
            EmulatorError: the launch does not fit the kernel or a GPU's limits, or the kernel did
                what it must not; then its outputs are partly written.
        """
        if kernel not in self._kernels:
            raise EmulatorError(f"no kernel {kernel!r}, there are {', '.join(self._kernels)}")
        entry = self._kernels[kernel]
        _check_arguments(kernel, entry.parameters.decode(), arguments)
        _check_shape(kernel, entry.max_threads, grid, block)
        if shared_bytes < 0 or shared_bytes > self._max_shared_bytes:
            raise EmulatorError(
                f"{kernel}: {shared_bytes} bytes of dynamic shared memory, "
                f"at most {self._max_shared_bytes} are allowed"
            )
        if 0 in grid:
            return
        codes, numbers = _bits(arguments)
        block_of_arguments = ArgumentBlock(codes)
        order, seed = _order
        launch = _Launch(
            kernel=ctypes.pointer(entry),
            arguments=block_of_arguments.filled(numbers),
            grid=grid,
            block=block,
            shared_bytes=shared_bytes,
            seed=seed,
            order=order,
        )
        error = self._launch(ctypes.byref(launch))
        del block_of_arguments  # what the pointers point at, until here
        if error is not None:
            raise EmulatorError(_with_lines(error.decode(), self._path))


def _check_arguments(kernel: str, parameters: str, arguments: Sequence[Argument]) -> None:
    if len(arguments) != len(parameters):
        raise EmulatorError(f"{kernel}: expected {len(parameters)} arguments, got {len(arguments)}")
    kinds = {"p": "a pointer", "i": "an integer", "d": "a double"}
    for i, (parameter, argument) in enumerate(zip(parameters, arguments, strict=True)):
        if isinstance(argument, Tensor) and argument.device.type != "cpu":
            raise EmulatorError(f"{kernel}: argument {i} is a tensor on {argument.device}, not cpu")
        fits = "d" if isinstance(argument, float) else "pi" if isinstance(argument, int) else "p"
        if parameter in kinds and parameter not in fits:
            raise EmulatorError(
                f"{kernel}: parameter {i} is {kinds[parameter]}, got {type(argument).__name__}"
            )


def _bits(arguments: Sequence[Argument]) -> tuple[str, list[int | float]]:
    """Each argument's code in ``struct``, and its value."""
    codes = ["d" if isinstance(a, float) else "q" if isinstance(a, int) else "Q" for a in arguments]
    numbers = [a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments]
    return "".join(codes), numbers


def _check_shape(
    kernel: str, max_threads: int, grid: tuple[int, int, int], block: tuple[int, int, int]
) -> None:
    if any(not 0 <= n <= limit for n, limit in zip(grid, MAX_GRID, strict=True)):
        raise EmulatorError(f"{kernel}: grid {grid} is not within {MAX_GRID}")
    if any(not 1 <= n <= limit for n, limit in zip(block, MAX_BLOCK, strict=True)):
        raise EmulatorError(f"{kernel}: block {block} is not within {MAX_BLOCK}")
    threads = block[0] * block[1] * block[2]
    if threads > min(max_threads, MAX_THREADS):
        limit = "__launch_bounds__" if max_threads < MAX_THREADS else "a GPU"
        raise EmulatorError(
            f"{kernel}: block {block} has {threads} threads, {limit} allows "
            f"{min(max_threads, MAX_THREADS)}"
        )


def _with_lines(error: str, library: Path) -> str:
    """Replaces each <+offset> in the library by the line of the source that is there."""

    def line(match: re.Match[str]) -> str:
        command = ["addr2line", "-i", "-e", str(library), match[1]]
        try:
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return ""
        # Innermost first: a line of the emulator's headers is called from one of the source.
        for place in lines.splitlines():
            if not place.startswith(("??", str(FOLDER))):
                return f" at {Path(place.split(' ')[0]).name}"
        return ""

    return re.sub(r" <\+(0x[0-9a-f]+)>", line, error)
