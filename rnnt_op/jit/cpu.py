"""What the CPU of this machine executes, asked of the system rather than of a compiler."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

# Of x86, the instruction sets that a compiler uses unasked; Linux lists much else beside them.
_USED = re.compile(r"(s?sse|avx|fma|f16c|bmi|abm|popcnt|movbe|xop|tbm|cx16|lahf)")

_FLAGS = re.compile(r"^(?:flags|Features)\s*:(.*)$", re.MULTILINE)

# The first processor's lines; those of ARM have other names.
_DESCRIBES = re.compile(
    r"^(?:vendor_id|cpu family|model|model name|CPU implementer|CPU variant|CPU part)\s*:\s*(.*)$",
    re.MULTILINE,
)


@functools.cache
def instruction_sets() -> str | None:
    """Their names, in order; None where the system does not say."""
    machine = platform.machine()
    try:
        found = _FLAGS.search(_cpuinfo())
    except OSError:
        return None
    if found is None:
        return None
    names = sorted(set(found[1].split()))
    if machine in ("x86_64", "AMD64"):
        names = [name for name in names if _USED.match(name)]
    return " ".join((machine, *names))


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether it has instructions for products of bfloat16; so where the system does not say."""
    try:
        found = _FLAGS.search(_cpuinfo())
    except OSError:
        return True
    names = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
    return found is None or not names.isdisjoint(found[1].split())


@functools.cache
def model() -> str | None:
    """What tells kinds of CPUs apart that execute the same: maker, family, model and name; None
    where the system does not say."""
    try:
        found = _DESCRIBES.findall(_cpuinfo().partition("\n\n")[0])
    except OSError:
        return None
    return "; ".join(found) or None


def _cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text()
