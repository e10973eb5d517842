"""What a cubin says of its kernels, read from its ELF sections."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Attributes of .nv.info, as cuobjdump -elf names them.
_MAX_THREADS = 0x05
_PARAMETER = 0x17
_PARAMETERS_SIZE = 0x19
_REGISTERS = 0x2F
_WITH_PAYLOAD = 4  # format of an attribute whose value is the size of what follows


@dataclass(frozen=True)
class Kernel:
    """An entry point."""

    name: str
    parameters: tuple[tuple[int, int], ...]  # offset and size of each in bytes
    max_threads: int  # of __launch_bounds__
    registers: int  # of a thread
    shared_bytes: int  # static; from sm_90 on with 1 KiB that the system takes


def kernels_of(cubin: bytes) -> dict[str, Kernel]:
    """The kernels of a cubin by name."""
    sections = dict(_sections(cubin))
    symbols = _symbols(sections[".symtab"][0], sections[".strtab"][0])
    registers = {}
    for attribute, value in _attributes(sections[".nv.info"][0]):
        if attribute == _REGISTERS:
            symbol, count = struct.unpack("<II", value)
            registers[symbols[symbol]] = count
    found = {}
    for section, (contents, _) in sections.items():
        if not section.startswith(".nv.info."):
            continue
        name = section.removeprefix(".nv.info.")
        parameters, max_threads, size = {}, 0, 0
        for attribute, value in _attributes(contents):
            if attribute == _PARAMETER:
                _, ordinal, offset, packed = struct.unpack("<IHHI", value)
                parameters[ordinal] = (offset, packed >> 18)
            elif attribute == _MAX_THREADS:
                x, y, z = struct.unpack("<III", value)
                max_threads = x * y * z
            elif attribute == _PARAMETERS_SIZE:
                (size,) = struct.unpack("<H", value)
        in_order = tuple(parameters[i] for i in range(len(parameters)))
        assert size == sum(size for _, size in in_order), f"{name}: parameters with gaps"
        _, shared_bytes = sections.get(f".nv.shared.{name}", (b"", 0))
        found[name] = Kernel(name, in_order, max_threads, registers[name], shared_bytes)
    return found


def _sections(elf: bytes) -> Iterator[tuple[str, tuple[bytes, int]]]:
    """Name, contents and size of each section; some have a size and no contents."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * entry_size) for i in range(count)]
    for name, kind, _, _, offset, size, *_ in headers:
        has_contents = kind != 8  # SHT_NOBITS
        contents = elf[offset : offset + size] if has_contents else b""
        yield _text(elf, headers[names][4] + name), (contents, size)


def _symbols(table: bytes, names: bytes) -> list[str]:
    return [_text(names, name) for name, *_ in struct.iter_unpack("<IBBHQQ", table)]


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _WITH_PAYLOAD:
            yield attribute, info[at : at + size]
            at += size
        else:
            yield attribute, info[at - 2 : at]


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()
