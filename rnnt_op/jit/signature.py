"""What kernels take, read from their source, and arguments that fit it.

Every parameter is a pointer, an integer of 64 bits or a double: eight bytes, as the driver takes
them and as C functions do. Neither a driver nor a C function sees that two of them are exchanged,
so arguments come by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from rnnt_op.jit.concurrency import remembered
from rnnt_op.jit.errors import ArgumentError
from rnnt_op.jit.source import KernelSource

Argument: TypeAlias = Tensor | int | float | None
Arguments: TypeAlias = dict[str, Argument] | Sequence[Argument]
"""By the parameters' names, others being left alone; or one for each parameter."""

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_KERNEL = re.compile(r'extern "C"([^{};]*)\{')
_QUALIFIER = re.compile(r"\b(const|__restrict__)\b|\bstd::")

_INTEGERS = ("long long", "unsigned long long", "int64_t", "uint64_t")
_ELEMENTS: dict[str, tuple[torch.dtype, ...]] = {
    **dict.fromkeys(_INTEGERS, (torch.int64,)),
    **dict.fromkeys(("int", "int32_t"), (torch.int32,)),
    **dict.fromkeys(("short", "int16_t"), (torch.int16,)),
    **dict.fromkeys(("unsigned char", "uint8_t"), (torch.uint8, torch.bool)),
    "bool": (torch.bool,),
    "double": (torch.float64,),
    "float": (torch.float32,),
    "bfloat16": (torch.bfloat16,),
    "float16": (torch.float16,),
    "void": (),
}
_EXPECTED = {"Q": "a tensor or None", "q": "an int of 64 bits", "d": "a float"}


@dataclass(frozen=True)
class Parameter:
    """Of a kernel."""

    name: str
    code: str  # of struct: "Q" a pointer, "q" an integer, "d" a double
    dtypes: tuple[torch.dtype, ...] = ()  # what a pointer may point at; empty: anything


@dataclass(frozen=True)
class Signature:
    """A kernel's parameters."""

    kernel: str
    filename: str
    parameters: tuple[Parameter, ...]

    def without_first(self) -> Signature:
        return replace(self, parameters=self.parameters[1:])

    @remembered
    def codes(self) -> str:
        """Of each parameter."""
        return "".join(parameter.code for parameter in self.parameters)

    @remembered
    def _kinds(self) -> Sequence[tuple[Parameter, str, str, tuple[torch.dtype, ...]]]:
        return [(p, p.name, p.code, p.dtypes) for p in self.parameters]

    def named(self, arguments: Arguments) -> dict[str, Argument]:
        """An argument for each parameter, by its name.

        Raises:
            ArgumentError: one is missing, or there are more that have no names.
        """
        names = [parameter.name for parameter in self.parameters]
        if not isinstance(arguments, dict):
            if len(arguments) != len(names):
                raise ArgumentError(
                    f"{self.kernel} in {self.filename}: expected {len(names)} arguments "
                    f"({', '.join(names)}), got {len(arguments)}"
                )
            return dict(zip(names, arguments, strict=True))
        try:
            return {name: arguments[name] for name in names}
        except KeyError:
            raise self._missing(arguments) from None

    def values(self, arguments: Arguments, gpu: int | None = None) -> list[int | float]:
        """A tensor's address, 0 for None, and numbers as they are; a bool is the int 0 or 1.

        Args:
            arguments: of each parameter.
            gpu: index of the device on which tensors lie; None: the CPU.

        Raises:
            ArgumentError: one is missing or does not fit its parameter, or there are more.
        """
        # Half of a launch's time on the host is spent here, so names are not looked up twice.
        given = arguments if isinstance(arguments, dict) else self.named(arguments)
        numbers: list[int | float] = []
        add = numbers.append
        for parameter, name, code, dtypes in self._kinds:
            try:
                argument = given[name]
            except KeyError:
                raise self._missing(given) from None
            if code == "Q":
                if argument is None:
                    add(0)
                elif (
                    isinstance(argument, Tensor)
                    and (not dtypes or argument.dtype in dtypes)
                    # A kernel would read a foreign address, which ends a process's use of the GPU.
                    and (argument.is_cpu if gpu is None else argument.get_device() == gpu)
                ):
                    add(argument.data_ptr())
                else:
                    raise self._refusal(parameter, argument, gpu)
            elif (code == "q" and isinstance(argument, int) and -(2**63) <= argument < 2**63) or (
                code == "d" and isinstance(argument, float)
            ):
                add(argument)
            else:
                raise self._refusal(parameter, argument, gpu)
        return numbers

    def _missing(self, given: dict[str, Argument]) -> ArgumentError:
        missing = ", ".join(p.name for p in self.parameters if p.name not in given)
        return ArgumentError(f"{self.kernel} in {self.filename}: no argument for {missing}")

    def _refusal(self, parameter: Parameter, argument: object, gpu: int | None) -> ArgumentError:
        expected, got = _EXPECTED[parameter.code], f"{argument!r}"
        if isinstance(argument, Tensor):
            got = f"a tensor of {argument.dtype}"
            if parameter.code == "Q" and argument.dtype in (parameter.dtypes or [argument.dtype]):
                expected = "the CPU" if gpu is None else f"cuda:{gpu}"
                expected, got = f"a tensor on {expected}", f"one on {argument.device}"
            elif parameter.dtypes:
                expected = f"a tensor of {' or '.join(map(str, parameter.dtypes))}"
        return ArgumentError(
            f"{self.kernel} in {self.filename}: expected {parameter.name} as {expected}, got {got}"
        )


def signatures(source: KernelSource) -> Mapping[str, Signature]:
    """Of each ``extern "C"`` function that the source itself defines, by its name.

    Raises:
        ArgumentError: a parameter is of no type that kernels take.
    """
    macros = dict(source.macros)
    found = {}
    for definition in _KERNEL.findall(_COMMENT.sub("", source.text)):
        before, _, inside = _taken(definition, macros).rpartition(")")[0].rpartition("(")
        if not before:
            continue
        kernel = before.split()[-1]
        parameters = tuple(
            _parameter(text, i, macros, f"{kernel} in {source.filename}")
            for i, text in enumerate(inside.split(","))
            if text.strip()
        )
        found[kernel] = Signature(kernel, source.filename, parameters)
    return found


def _taken(text: str, macros: Mapping[str, str]) -> str:
    """What the preprocessor leaves of a text with ``#if NAME``."""
    lines, taken = [], [True]
    for line in text.splitlines():
        directive, _, condition = line.strip().partition(" ")
        if directive == "#if":
            taken.append(macros.get(condition.strip(), "0") != "0")
        elif directive == "#else":
            taken[-1] = not taken[-1]
        elif directive == "#endif":
            taken.pop()
        elif all(taken):
            lines.append(line)
    return "\n".join(lines)


def _parameter(text: str, index: int, macros: Mapping[str, str], where: str) -> Parameter:
    element, star, name = _QUALIFIER.sub("", text).partition("*")
    words = element.split()
    if not star and " ".join(words) not in (*_INTEGERS, "double"):
        *words, name = words
    element = " ".join(macros.get(word, word) for word in words)
    name = name.strip() or f"parameter {index}"
    if star and element in _ELEMENTS and "*" not in name:
        return Parameter(name, "Q", _ELEMENTS[element])
    if not star and element in (*_INTEGERS, "double"):
        return Parameter(name, "d" if element == "double" else "q")
    raise ArgumentError(f"{where}: no type that kernels take: {' '.join(text.split())}")
