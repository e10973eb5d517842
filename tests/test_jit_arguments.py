"""Kernel arguments, bit for bit."""

import ctypes
import math
import struct
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from rnnt_op.jit import ArgumentError
from rnnt_op.jit.arguments import pack


def packed(*arguments: Any) -> list[bytes]:
    """The eight bytes that each pointer leads to."""
    values, pointers = pack(arguments)
    assert ctypes.sizeof(values) == ctypes.sizeof(pointers) == 8 * len(arguments)
    return [ctypes.string_at(pointer, 8) for pointer in pointers]


def test_each_kind_bit_for_bit() -> None:
    tensor = torch.zeros(5)[2:]
    arguments = (tensor, None, 1, -1, 2**63 - 1, -(2**63), 0.1, -0.0, math.inf)
    assert packed(*arguments) == [
        struct.pack("<Q", tensor.data_ptr()),
        bytes(8),
        b"\x01" + bytes(7),
        b"\xff" * 8,
        b"\xff" * 7 + b"\x7f",
        bytes(7) + b"\x80",
        bytes.fromhex("9a9999999999b93f"),
        bytes(7) + b"\x80",
        bytes.fromhex("000000000000f07f"),
    ]
    (nan,) = packed(math.nan)
    assert math.isnan(struct.unpack("<d", nan)[0])


def test_bool_is_an_int() -> None:
    assert packed(True, False) == packed(1, 0)


def test_parameter_is_a_pointer() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    assert packed(parameter) == [struct.pack("<Q", parameter.data_ptr())]


def test_none_at_all() -> None:
    assert packed() == []


def test_pointers_are_addresses_of_the_values() -> None:
    values, pointers = pack([1, 2.0, None])
    first = ctypes.addressof(values)
    assert list(pointers) == [first, first + 8, first + 16]


def message(*arguments: Any) -> str:
    with pytest.raises(ArgumentError) as error:
        pack(arguments)
    return str(error.value)


def test_errors_name_the_argument() -> None:
    assert_expected_inline(
        message(1.5, 0, 2**63),
        """argument 2: 9223372036854775808 does not fit in 64 signed bits""",
    )
    assert_expected_inline(
        message(-(2**63) - 1),
        """argument 0: -9223372036854775809 does not fit in 64 signed bits""",
    )
    assert_expected_inline(
        message(torch.zeros(1), "3"),
        """argument 1: expected a tensor, int, float or None, got str""",
    )
