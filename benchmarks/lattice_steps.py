"""What a step of the lattice kernel takes by its machine code, and how many a sample has.

    python benchmarks/lattice_steps.py
    python benchmarks/lattice_steps.py --architectures sm_80 --frames 200 --labels 127

Needs no GPU. NVRTC makes the code, nvdisasm reads it (pip install nvidia-cuda-nvdisasm). Each
instruction says how many cycles the next one waits, and for which of six scoreboards it waits
itself, which loads and shuffles set. With a latency for these, that gives the cycles of a warp that
has its scheduler for itself, as in a block of four warps: it issues in order, and a float64
instruction takes two cycles.

Latencies of what sets a scoreboard are estimates; those of the rest are what ptxas wrote down.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from command_line import parse
from machine_code import find_nvdisasm

from rnnt_op import topologies
from rnnt_op.backends.lattice_walk import TURN, Walk
from rnnt_op.backends.sources import CUDA
from rnnt_op.jit import KernelSource
from rnnt_op.jit.build import build
from rnnt_op.jit.cuda_compiler import CudaCompiler
from rnnt_op.tools.study.report import markdown_table
from rnnt_op.topology import RNNT

TOPOLOGIES = {
    "rnnt": RNNT,
    "constrained": topologies.constrained(),
    "multi-blank": topologies.multi_blank(),
    "tdt": topologies.tdt(),
}
FLOAT64 = ("DADD", "DMUL", "DFMA", "DSETP")
_FLOAT64_CYCLES = 2  # 16 lanes of a scheduler
LATENCIES = {
    **dict.fromkeys(FLOAT64, 10),  # where it is not written down; it is 8 on sm_90
    **{"SHFL": 24, "LD": 35, "LDS": 29, "LDC": 40, "S2R": 30, "BAR": 24, "ST": 12},
}
_OTHER_LATENCY = 24  # conversions, and what else has no fixed one
SCORES = {"L1": 35, "L2": 270}  # cycles until a load of scores is there

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]+) \*/")
_SECOND_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]+) \*/")
_TARGET = re.compile(r"\((\.L\w+)\)")


@dataclass(frozen=True)
class Config:
    """A sample and where its kernel runs."""

    architectures: tuple[str, ...] = ("sm_90a",)
    frames: int = 435
    labels: int = 62


@dataclass
class Instruction:
    text: str
    control: int = 0  # bits 105 and on

    @property
    def opcode(self) -> str:
        words = self.text.split()
        return words[1 if words[0].startswith("@") else 0].split(".")[0]

    @property
    def target(self) -> str | None:
        """Where a branch leads, unless it keeps a diverged warp together."""
        match = _TARGET.search(self.text)
        return match[1] if match and self.opcode == "BRA" and "BRA.DIV" not in self.text else None

    @property
    def stall(self) -> int:
        return max(1, self.control & 15)

    @property
    def scoreboards(self) -> list[tuple[int, bool]]:
        """That it sets, and whether when it has read its operands, not when its result is there."""
        fields = (self.control >> 5 & 7, False), (self.control >> 8 & 7, True)
        return [(number, reads) for number, reads in fields if number < 6]

    @property
    def waits(self) -> list[int]:
        return [i for i in range(6) if self.control >> 11 + i & 1]


def loop_of(
    source: KernelSource, kernel: str, architecture: str, nvdisasm: str
) -> list[Instruction]:
    """The smallest loop of a kernel that has float64 sums, and shuffles or barriers, as a warp goes
    through it: past what is rare, which another loop or an unlikely function shows."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(build(source, CudaCompiler(architecture)).compiled.binary)
        file.flush()
        command = [nvdisasm, "-c", "-hex", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"^\.text\.(\w+):$", listing, flags=re.MULTILINE)
    code: list[Instruction] = []
    places: dict[str, int] = {}
    for line in dict(zip(parts[::2], parts[1::2], strict=True))[kernel].splitlines():
        if match := _LINE.match(line):
            code.append(Instruction(match[1]))
        elif match := _SECOND_WORD.match(line):
            code[-1].control = int(match[1], 16) >> 41
        elif line.startswith(".L"):
            places[line.split(":")[0]] = len(code)

    def leads_to(i: int) -> int:
        return places.get(code[i].target or "", i)

    loops = [code[leads_to(i) : i + 1] for i in range(len(code)) if leads_to(i) < i]
    opcodes = [{instruction.opcode for instruction in loop} for loop in loops]
    found = [
        loop
        for loop, names in zip(loops, opcodes, strict=True)
        if "DFMA" in names and names & {"SHFL", "BAR"}
    ]
    loop = min(found, key=len)
    begin = next(i for i, instruction in enumerate(code) if instruction is loop[0])
    taken, i = [], begin
    while i < begin + len(loop):
        taken.append(code[i])
        skipped = range(i + 1, leads_to(i))
        is_rare = any(code[j].opcode == "MUFU" or leads_to(j) < j for j in skipped)
        is_inside = bool(skipped) and skipped.stop <= begin + len(loop)
        is_taken = is_inside and (is_rare or not code[i].text.startswith("@"))
        i = skipped.stop if is_taken else i + 1
    return taken


def cycles_of(loop: list[Instruction], score_latency: int, rounds: int = 64) -> float:
    """Of one round, once rounds take equally long."""
    latencies = {**LATENCIES, "LDG": score_latency}
    cycle = free = 0  # of the next instruction, of the float64 unit
    ready = [0] * 6
    ends = []
    for _ in range(rounds):
        for instruction in loop:
            opcode = instruction.opcode
            cycle = max([cycle, *(ready[i] for i in instruction.waits)])
            if opcode in FLOAT64:
                cycle = max(cycle, free)
                free = cycle + _FLOAT64_CYCLES
            for i, reads in instruction.scoreboards:
                latency = LATENCIES["ST"] if reads else latencies.get(opcode, _OTHER_LATENCY)
                ready[i] = max(ready[i], cycle + latency)
            cycle += instruction.stall + (LATENCIES["BAR"] if opcode == "BAR" else 0)
        ends.append(cycle)
    half = rounds // 2
    return (ends[-1] - ends[half - 1]) / (rounds - half)


def main(config: Config) -> None:
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise SystemExit("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    for architecture in config.architectures:
        rows = []
        for name, topology in TOPOLOGIES.items():
            loop = loop_of(CUDA.lattice(topology), "forward_backward", architecture, nvdisasm)
            steps = sum(instruction.opcode == "SHFL" for instruction in loop) // 4  # two doubles
            turns = Walk(topology, config.frames, config.labels + 1).turns
            rows.append(
                {
                    "topology": name,
                    "instructions of a step": round(len(loop) / steps),
                    "float64": round(sum(i.opcode in FLOAT64 for i in loop) / steps),
                    **{
                        f"cycles, scores in {place}": round(cycles_of(loop, latency) / steps)
                        for place, latency in SCORES.items()
                    },
                    "diagonals": config.frames + config.labels,
                    "steps": turns * TURN,
                    "barriers": turns,
                }
            )
        print(f"{architecture}, T={config.frames}, U={config.labels}\n\n{markdown_table(rows)}\n")


if __name__ == "__main__":
    main(parse(Config, __doc__))
