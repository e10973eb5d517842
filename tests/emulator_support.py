"""Kernels of the emulator's own tests."""

from __future__ import annotations

import ctypes
import re
import signal
from collections.abc import Callable, Sequence

import pytest
from emulator import EmulatedModule, EmulatorError

from rnnt_op.jit import Argument

Compile = Callable[..., EmulatedModule]
ORDERS = pytest.mark.parametrize("order", ["ascending", "descending", "shuffled(3)"])


def message(
    module: EmulatedModule,
    kernel: str,
    arguments: Sequence[Argument] = (),
    block: tuple[int, int, int] = (32, 1, 1),
    grid: tuple[int, int, int] = (1, 1, 1),
    shared_bytes: int = 0,
) -> str:
    """The error of a launch, without addresses."""
    with pytest.raises(EmulatorError) as error:
        module.launch(kernel, grid, block, arguments, shared_bytes)
    return re.sub(r" at 0x[0-9a-f]+", " at <address>", str(error.value))


def signal_handlers() -> list[bytes]:
    """What the kernel would call for each signal that the emulator uses, and on which stack."""
    libc = ctypes.CDLL(None)
    states = []
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL):
        action = ctypes.create_string_buffer(256)
        assert libc.sigaction(int(number), None, action) == 0
        states.append(action.raw[:8] + action.raw[136:140])  # sa_handler and sa_flags
    stack = ctypes.create_string_buffer(64)
    assert libc.sigaltstack(None, stack) == 0
    return [*states, stack.raw[:12]]  # ss_sp and ss_flags
