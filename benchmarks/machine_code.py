"""Registers, occupancy and memory instructions of each kernel, from its machine code.

    python benchmarks/machine_code.py
    python benchmarks/machine_code.py --architectures sm_90a --dtypes float16

Needs no GPU. NVRTC makes the code, nvdisasm reads it (pip install nvidia-cuda-nvdisasm). Occupancy
is what registers and threads allow in blocks of the most threads that a kernel has; a lattice's
shared memory may allow less.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from command_line import parse
from cubin import kernels_of

from rnnt_op.backends.kernels import Kernels
from rnnt_op.backends.sources import CUDA
from rnnt_op.jit import KernelSource
from rnnt_op.jit.build import build
from rnnt_op.jit.cuda_compiler import CudaCompiler
from rnnt_op.tools.study.report import markdown_table

MAX_WARPS = 64  # of a multiprocessor of sm_80 and sm_90; 48 of sm_86, 89 and 120
REGISTERS = 65536
_REGISTERS_AT_ONCE = 256  # of a warp
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
LOCAL = ("LDL", "STL")


@dataclass(frozen=True)
class Config:
    """Kernels of the loss and best paths on the regular lattice."""

    architectures: tuple[str, ...] = ("sm_80", "sm_90a")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    activation: str = "tanh"


@dataclass(frozen=True)
class Code:
    """A kernel's machine code."""

    kernel: str
    max_threads: int  # of a block
    registers: int  # of a thread
    opcodes: Counter[str]

    @property
    def warps(self) -> int:
        """Of a multiprocessor at once."""
        warps = -(-self.max_threads // 32)
        taken = -(-32 * self.registers // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE * warps
        return min(REGISTERS // taken, MAX_WARPS // warps) * warps

    def count(self, *beginnings: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(beginnings))


def find_nvdisasm() -> str | None:
    from cuda import pathfinder

    path: str | None = pathfinder.find_nvidia_binary_utility("nvdisasm")
    return path


def codes_of(source: KernelSource, architecture: str, nvdisasm: str) -> Iterator[Code]:
    """Of each kernel of a source, in the order of the disassembly."""
    cubin = build(source, CudaCompiler(architecture)).compiled.binary
    kernels = kernels_of(cubin)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvdisasm, "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"^\.text\.(\w+):$", listing, flags=re.MULTILINE)
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        kernel = kernels[name]
        opcodes = Counter(match[1] for match in map(_OPCODE.match, text.splitlines()) if match)
        yield Code(name, kernel.max_threads, kernel.registers, opcodes)


def sources_of(dtype: torch.dtype, activation: str) -> list[KernelSource]:
    kernels = Kernels(dtype, input_dtype=dtype, activation=activation)
    return [*CUDA.needed(kernels), CUDA.best_paths(kernels.topology), CUDA.given_rows(dtype)]


def main(config: Config) -> None:
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise SystemExit("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    for architecture in config.architectures:
        rows, seen = [], set()
        for name in config.dtypes:
            for source in sources_of(getattr(torch, name), config.activation):
                if source in seen:
                    continue
                seen.add(source)
                for code in codes_of(source, architecture, nvdisasm):
                    operand = dict(source.macros).get("OPERAND", "any")
                    rows.append(
                        {
                            "kernel": code.kernel,
                            "operand": operand,
                            "threads": code.max_threads,
                            "registers": code.registers,
                            "warps": code.warps,
                            "occupancy": f"{code.warps / MAX_WARPS:.0%}",
                            "instructions": code.opcodes.total(),
                            "16-byte loads": code.count("LDG.E.128"),
                            "other loads": code.count("LDG") - code.count("LDG.E.128"),
                            "local": code.count(*LOCAL),
                        }
                    )
        print(f"{architecture}\n\n{markdown_table(rows)}\n")


if __name__ == "__main__":
    main(parse(Config, __doc__))
