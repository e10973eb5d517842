"""What each kernel moves and computes, and the time that a GPU needs for it at least.

Assumptions:

- A chunk's buffers (hidden states, logits and their gradients) are larger than the L2 cache: each
  kernel reads and writes them in DRAM, once.
- The output layer's weight, columns, and whatever is indexed by sample come from L2, and so does a
  packed encoder or predictor row after its first use in a chunk.
- α and β are computed side by side, and both read the scores from DRAM. The β of a neighbouring
  node comes from L2.
- Kept nodes are spread evenly over the lattice.
- A torch operation moves each operand once.

Instructions were counted in the machine code along the branches taken by a joint network with a
bias; where a warp diverges, both sides count. Chains of dependent steps, during which a block can
do nothing else, are estimates.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from typing import Literal

import torch

from rnnt_op.backends.records import BINS
from rnnt_op.backends.sources import GRADIENT_LOOKS
from rnnt_op.memory import Workload

Phase = Literal["score", "backward"]

REAL_BYTES = 4  # of logits and sums, for float32 and for half operands

_COUNTED_IN = "2026-11-30, sm_90a, NVRTC 13.0.88"
_COUNTED_SOURCES = "92120f8778005ec3"


@dataclass(frozen=True)
class Loop:
    """Instructions of each lane of a warp that walks a row, whether the lane has work or not."""

    elements: int  # of a whole step
    step: float
    last: float  # step that the end of the row cuts short
    row: float  # outside the loop

    def instructions(self, elements: int) -> float:
        """Of all lanes, for a row."""
        steps, rest = divmod(elements, self.elements)
        return 32 * (steps * self.step + (self.last if rest else 0) + self.row)


# By the operand's size in bytes.
_LOOPS = {
    "hidden": {2: Loop(512, 110, 74, 71), 4: Loop(256, 149, 95, 73)},
    # The reduction over a warp takes 28 of a row, what eight rows share 389.
    "symbol_scores": dict.fromkeys((2, 4), Loop(512, 129, 194, 74 + 389 / 8)),
    "logit_gradient": {2: Loop(256, 109, 118, 220), 4: Loop(128, 100, 116, 219)},
    # A step turns four rows.
    "joint_gradient": {2: Loop(256, 280 / 4, 280 / 4, 0), 4: Loop(128, 151 / 4, 151 / 4, 0)},
}
# Of float64 for each row or node, idle lanes included: exp takes 16, log 30.
_FLOAT64_INSTRUCTIONS = {
    "symbol_scores": 32 * 92 / 8,
    "forward_backward": 2 * 64,
    "occupancies": 58,
    "gradient_mass": 42,
    "logit_gradient": 32 * 31,
}
# Of any kind for each node, in kernels whose elements are nodes.
_NODE_INSTRUCTIONS = {
    "forward_backward": 2 * 142,
    "occupancies": 285,
    "gradient_mass": 142,
    "count_kept": 22,
    "write_kept": 37,
}

# joint_gradient: rows that a warp has in flight; warps of a multiprocessor, by registers; and the
# instructions of a warp beside rows: once, and each time that it looks for more of them.
_ROWS_IN_FLIGHT = 4
_GRADIENT_WARPS = {2: 24, 4: 32}
_BLOCK_INSTRUCTIONS, _LOOKS_INSTRUCTIONS = 280, 240
# In waits for a row from DRAM: where rows begin, what is there already, and a list of rows.
_BLOCK_WAITS, _LIST_WAITS = 4.0, 1.0

# forward_backward: threads of a multiprocessor, by registers.
_RECURSION_THREADS = 512


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU, per second, and estimates of what a dependent step takes."""

    name: str
    bytes: float
    bf16_flops: float  # of GEMMs on tensor cores
    fp32_flops: float
    fp64_flops: float
    multiprocessors: int
    clock: float
    # lattice_steps.py: 258 of a step with scores in L2, and a barrier of 24 in 16 steps.
    step_cycles: float = 260
    row_seconds: float = 0.35e-6  # from DRAM

    def gemm_flops(self, dtype: torch.dtype) -> float:
        return self.bf16_flops if dtype.itemsize == 2 else self.fp32_flops

    @property
    def instructions(self) -> float:
        """Of all lanes: four warps' instructions a cycle and multiprocessor."""
        return self.multiprocessors * 4 * 32 * self.clock

    @property
    def fp64_instructions(self) -> float:
        return self.fp64_flops / 2


H200 = Gpu(
    "NVIDIA H200: 4.3 TB/s and 790 TFLOP/s in bfloat16 as measured on one; 67 TFLOP/s in float32, "
    "34 TFLOP/s in float64 and 1.98 GHz by the vendor's datasheet",
    bytes=4.3e12,
    bf16_flops=790e12,
    fp32_flops=67e12,
    fp64_flops=34e12,
    multiprocessors=132,
    clock=1.98e9,
)


@dataclass(frozen=True)
class Work:
    """Work of one kernel in one phase."""

    kernel: str
    phase: Phase
    launches: int = 0  # kernels
    read: float = 0  # bytes
    written: float = 0
    flops: float = 0  # of GEMMs
    instructions: float = 0  # of lanes
    fp64_instructions: float = 0
    steps: float = 0  # of the recursion, which wait for one another
    waits: float = 0  # for rows, one after another
    calls: int = 1  # by the host, of kernels or torch operations

    def __add__(self, other: Work) -> Work:
        names = [f.name for f in fields(self) if f.name not in ("kernel", "phase")]
        return replace(self, **{n: getattr(self, n) + getattr(other, n) for n in names})

    def bounds(self, gpu: Gpu, dtype: torch.dtype) -> dict[str, float]:
        """Seconds that each resource takes at least."""
        return {
            "DRAM": (self.read + self.written) / gpu.bytes,
            "GEMM": self.flops / gpu.gemm_flops(dtype),
            "issue": self.instructions / gpu.instructions,
            "float64": self.fp64_instructions / gpu.fp64_instructions,
            "chain": self.steps * gpu.step_cycles / gpu.clock + self.waits * gpu.row_seconds,
        }

    def seconds(self, gpu: Gpu, dtype: torch.dtype) -> float:
        return max(self.bounds(gpu, dtype).values())


@dataclass(frozen=True)
class Rows:
    """The rows of one launch: of a chunk, or the nodes of a group."""

    workload: Workload
    phase: Phase
    count: int
    kept: float  # share of the nodes that they are, of the nodes that they span

    @property
    def mean_states(self) -> float:
        """Nodes of a frame."""
        return self.workload.nodes / sum(t for t, _ in self.workload.lengths)

    @property
    def samples(self) -> float:
        return self.count / self.kept / (self.workload.nodes / self.workload.batch)

    @property
    def frames(self) -> float:
        """Packed encoder rows that they meet."""
        return min(self.count, self.count / self.kept / self.mean_states)

    @property
    def states(self) -> float:
        """Packed predictor rows that they meet."""
        return min(self.count, self.mean_states * max(1.0, self.samples))

    def work(
        self, kernel: str, read: float, written: float, *, flops: float = 0, elements: int = 0
    ) -> Work:
        """One launch.

        Args:
            kernel: its name.
            read: bytes.
            written: bytes.
            flops: of a GEMM.
            elements: of a row, which a warp walks.
        """
        loop = _LOOPS.get(kernel, {}).get(self.workload.dtype.itemsize)
        row = loop.instructions(elements) if loop else _NODE_INSTRUCTIONS.get(kernel, 0)
        return Work(
            kernel,
            self.phase,
            1,
            read,
            written,
            flops,
            self.count * row,
            self.count * _FLOAT64_INSTRUCTIONS.get(kernel, 0),
        )


def hidden(rows: Rows) -> Work:
    n, h, size = rows.count, rows.workload.joint_dim, rows.workload.dtype.itemsize
    states = (rows.frames + rows.states) * h * size
    return rows.work("hidden", states + 8 * n, n * h * size, elements=h)


def gemm_logits(rows: Rows) -> Work:
    n, v, h, size = _sizes(rows)
    return rows.work("GEMM logits", n * h * size, n * v * REAL_BYTES, flops=2 * n * v * h)


def gemm_d_weight(rows: Rows) -> Work:
    n, v, h, size = _sizes(rows)
    return rows.work("GEMM d_weight", n * (v + h) * size, v * h * REAL_BYTES, flops=2 * n * v * h)


def gemm_d_hidden(rows: Rows) -> Work:
    n, v, h, size = _sizes(rows)
    return rows.work("GEMM d_hidden", n * v * size, n * h * REAL_BYTES, flops=2 * n * v * h)


def symbol_scores(rows: Rows) -> Work:
    n, v, _, _ = _sizes(rows)
    return rows.work("symbol_scores", n * v * REAL_BYTES + 4 * n, 16 * n, elements=v)


def logit_gradient(rows: Rows) -> Work:
    n, v, _, size = _sizes(rows)
    # A node's number, frame and state; its scores and occupancies, in 32-byte sectors.
    read = n * v * REAL_BYTES + (8 + 4 + 4 + 32 + 32) * n
    return rows.work("logit_gradient", read, n * v * size, elements=v)


def joint_gradient(rows: Rows, by_state: bool, warps: int, multiprocessors: int) -> Work:
    """Sums over the rows of an encoder row, or (``by_state``) of a predictor row, by ``warps``."""
    n, _, h, size = _sizes(rows)
    segments = rows.states if by_state else rows.frames
    sums = segments * h * REAL_BYTES
    work = rows.work("joint_gradient", n * h * (REAL_BYTES + size) + sums, sums, elements=h)
    all_warps = segments * -(-h * size // 512) * warps
    # A state's rows are looked for among those of its sample.
    looked_at = n / max(1.0, rows.samples) if by_state else n / segments
    lists = math.ceil(looked_at / (32 * GRADIENT_LOOKS * warps))
    steps = math.ceil(n / segments / lists / warps / _ROWS_IN_FLIGHT)
    waits = _BLOCK_WAITS + lists * (_LIST_WAITS + steps)
    instructions = 32 * all_warps * (_BLOCK_INSTRUCTIONS + lists * _LOOKS_INSTRUCTIONS)
    return replace(
        work,
        kernel=f"joint_gradient ({'predictor' if by_state else 'encoder'})",
        instructions=work.instructions + instructions,
        waits=max(1.0, all_warps / (_GRADIENT_WARPS[size] * multiprocessors)) * waits,
    )


def forward_backward(
    rows: Rows, blocks: int, threads: int, steps: int, multiprocessors: int
) -> Work:
    """Both directions; a block takes one of a sample, and those that fit run side by side."""
    n = rows.count
    work = rows.work("forward_backward", 2 * 16 * n, 2 * 8 * n)
    side_by_side = multiprocessors * min(32, _RECURSION_THREADS // threads)
    return replace(work, steps=-(-blocks // side_by_side) * steps)


def of_nodes(kernel: str, rows: Rows) -> Work:
    """Kernels with a thread a node."""
    n = rows.count
    read, written = {
        "pack": (16.0, 40.0),  # its rows are frames
        "node_rows": (0.0, 8.0),
        "occupancies": (16.0 + 8 + 8 + 4, 16.0),
        "gradient_mass": (16.0 + 16 + 4, 2.0),
        "count_kept": (2.0 + 4, 8 / 256),
        "scan_counts": (16.0, 8.0),  # of 256 nodes: its rows are counts
        "write_kept": (2.0 + 4 + 8 / 256, 8 * rows.kept),
        "thresholds": (2 * 8.0 * BINS, 4.0),  # its rows are samples
    }[kernel]
    return rows.work(kernel, read * n, written * n)


def stale_counts() -> str | None:
    """Why the instruction counts may not be those of the kernels, if so."""
    if sources_digest() == _COUNTED_SOURCES:
        return None
    return f"csrc has changed since its instructions were counted ({_COUNTED_IN}): they may be off"


def sources_digest() -> str:
    """Of the kernel sources without their comments and spaces."""
    csrc = files("rnnt_op.csrc")
    digest = hashlib.sha256()
    for name in sorted(f.name for f in csrc.iterdir() if f.name.endswith((".cu", ".cuh"))):
        code = re.sub(r"//.*", "", csrc.joinpath(name).read_text(encoding="utf-8"))
        digest.update("".join(code.split()).encode())
    return digest.hexdigest()[:16]


def _sizes(rows: Rows) -> tuple[int, int, int, int]:
    sizes = rows.workload
    return rows.count, sizes.vocab_size, sizes.joint_dim, sizes.dtype.itemsize
