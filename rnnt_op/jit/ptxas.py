"""What ptxas's report in a compiler log says of each kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(
    r"Compiling entry function '(?P<kernel>[^']+)'"
    r"|(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"|Used (?P<registers>\d+) registers"
)


@dataclass(frozen=True)
class Usage:
    """Registers of a thread, and bytes that did not fit in them (stores and loads)."""

    kernel: str
    registers: int
    spill_bytes: int


def usages(log: str) -> tuple[Usage, ...]:
    """The kernels of a log in its order; spills of functions they call count as theirs."""
    found: list[Usage] = []
    for match in _LINE.finditer(log):
        if match["kernel"]:
            found.append(Usage(match["kernel"], 0, 0))
        elif found:
            last = found[-1]
            registers = max(last.registers, int(match["registers"] or 0))
            spills = last.spill_bytes + int(match["stores"] or 0) + int(match["loads"] or 0)
            found[-1] = Usage(last.kernel, registers, spills)
    return tuple(found)
