"""Kernel arguments as the driver takes them: eight bytes each, and the address of each.

Every kernel parameter of this package is a pointer, a ``long long`` or a ``double``. The tests'
CPU emulator takes the same arrays.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from rnnt_op.jit.errors import ArgumentError

Argument: TypeAlias = Tensor | int | float | None
Values: TypeAlias = "ctypes.Array[ctypes.c_uint64]"
Pointers: TypeAlias = "ctypes.Array[ctypes.c_void_p]"


def pack(arguments: Sequence[Argument]) -> tuple[Values, Pointers]:
    """Packs a tensor as its address, None as a null pointer, an int in 64 bits, a float as double.

    A bool is the int 0 or 1.

    Returns:
        The values, and a pointer to each, which hold as long as the values live.

    Raises:
        ArgumentError: an int needs more than 64 bits, or an argument is of another type.
    """
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
    count = len(codes)
    values = (ctypes.c_uint64 * count)()
    try:
        struct.pack_into("=" + "".join(codes), values, 0, *numbers)
    except struct.error as error:
        index, number = next(
            (i, n)
            for i, n in enumerate(numbers)
            if isinstance(n, int) and not -(2**63) <= n < 2**63
        )
        raise ArgumentError(f"argument {index}: {number} does not fit in 64 signed bits") from error
    first = ctypes.addressof(values)
    return values, (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
