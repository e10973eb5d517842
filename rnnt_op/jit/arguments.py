"""Kernel arguments: eight bytes each, as the driver takes them and as C functions do.

Every kernel parameter of this package is a pointer, a ``long long`` or a ``double``. The tests'
CPU emulator takes what the driver takes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

from rnnt_op.jit.errors import ArgumentError

Argument: TypeAlias = Tensor | int | float | None
Values: TypeAlias = "ctypes.Array[ctypes.c_uint64]"
Pointers: TypeAlias = "ctypes.Array[ctypes.c_void_p]"

# By struct's codes. A C function takes a double in another register than an integer.
_C_TYPES: dict[str, Any] = {"Q": ctypes.c_void_p, "q": ctypes.c_int64, "d": ctypes.c_double}


def pack(arguments: Sequence[Argument]) -> tuple[Values, Pointers]:
    """Packs a tensor as its address, None as a null pointer, an int in 64 bits, a float as double.

    A bool is the int 0 or 1.

    Returns:
        The values, and a pointer to each, which hold as long as the values live.

    Raises:
        ArgumentError: an int needs more than 64 bits, or an argument is of another type.
    """
    codes, numbers = _read(arguments)
    count = len(codes)
    values = (ctypes.c_uint64 * count)()
    struct.pack_into("=" + "".join(codes), values, 0, *numbers)
    first = ctypes.addressof(values)
    return values, (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))


def c_values(arguments: Sequence[Argument]) -> list[Any]:
    """What ``ctypes`` passes to a C function: the values of ``pack``.

    Raises:
        ArgumentError: as ``pack``.
    """
    return [_C_TYPES[code](number) for code, number in zip(*_read(arguments), strict=True)]


def misplaced(kernel: str, filename: str, index: int, device: str, tensor: Tensor) -> ArgumentError:
    """The error of an argument that is not on the device that the kernel runs on."""
    return ArgumentError(
        f"{kernel} in {filename}: expected argument {index} on {device}, "
        f"got a tensor on {tensor.device}"
    )


def _read(arguments: Sequence[Argument]) -> tuple[list[str], list[int | float]]:
    """Each argument's code in ``struct``, and its value."""
    codes = []
    numbers: list[int | float] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            codes.append("Q")
            numbers.append(argument.data_ptr())
        elif argument is None:
            codes.append("Q")
            numbers.append(0)
        elif isinstance(argument, int):
            if not -(2**63) <= argument < 2**63:
                raise ArgumentError(
                    f"argument {len(codes)}: {argument} does not fit in 64 signed bits"
                )
            codes.append("q")
            numbers.append(argument)
        elif isinstance(argument, float):
            codes.append("d")
            numbers.append(argument)
        else:
            raise ArgumentError(
                f"argument {len(codes)}: expected a tensor, int, float or None, "
                f"got {type(argument).__name__}"
            )
    return codes, numbers
