"""What a step costs on paper, kernel by kernel, and what the compiler made of each kernel.

Needs no GPU, and measures none: bytes and operations are counted, and divided by an H200's rates.
The sum of every kernel's bound is the least that the step can take as it is written, beside the
forward GEMM alone, which no exact method can do without.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from command_line import parse
from cost_model import H200, Shape, Work, gemm_alone, stale_counts
from dry_run import Step, count_step
from on_device import real_lengths

from rnnt_op.jit import KernelSource
from rnnt_op.jit.build import build
from rnnt_op.jit.cuda_compiler import CudaCompiler
from rnnt_op.jit.ptxas import usages
from rnnt_op.precompile import Precompiled, precompile
from rnnt_op.study.report import markdown_table, write_results

_STACK = re.compile(r"Compiling entry function '([^']+)'|(\d+) bytes stack frame")
_SMALL = 0.005  # of the GEMM; what takes less shares a row


@dataclass(frozen=True)
class Config:
    """Costs of the GPU benchmarks' problems."""

    kept: tuple[float, ...] = (0.08, 1.0)
    """Shares of the nodes that the backward pass keeps."""
    batch: int | None = None
    """Instead of those problems, one with this batch size and the sizes below."""
    frames: int = 400
    labels: int = 128
    vocab_size: int = 1024
    joint_dim: int = 640
    dtype: str = "bfloat16"
    lengths: Path | None = None
    """LibriSpeech lengths, an .npy file of [n, 2]; else from RNNT_OP_LENGTHS."""
    host_microseconds: float = 10.0
    """Assumed: what Python takes to launch a kernel or call a torch operation."""
    architectures: tuple[str, ...] = (
        "sm_75",
        "sm_80",
        "sm_86",
        "sm_89",
        "sm_90a",
        "sm_100",
        "sm_120",
    )
    """Compiled for the table of registers; none: no table."""
    seed: int = 0
    out: Path = Path("benchmarks/results")


def shapes(config: Config) -> dict[str, Shape]:
    """The problems of ``speed_cuda.py`` and ``rnnt-op headline``, or one by hand."""
    if config.batch is not None:
        lengths = [(config.frames, config.labels)] * config.batch
        dtype = getattr(torch, config.dtype)
        return {"given": Shape(lengths, config.vocab_size, config.joint_dim, dtype)}
    full = Shape([(400, 128)] * 32, 1024, 640, torch.bfloat16)
    found = {"(i) bfloat16": full}
    real = real_lengths(config.lengths, 64)
    if isinstance(real, str):
        print(f"(ii) left out: {real}\n")
    else:
        found["(ii) LibriSpeech bfloat16"] = Shape(real, 500, 512, torch.bfloat16)
    found["(iii) float32"] = replace(full, dtype=torch.float32)
    found["headline bfloat16"] = Shape([(1000, 200)] * 1024, 1024, 640, torch.bfloat16)
    return found


def summary_of(name: str, shape: Shape, kept: float, step: Step, config: Config) -> dict[str, Any]:
    gemm = gemm_alone(shape, H200)
    bound = sum(work.seconds(H200, shape.dtype) for work in step.works)
    chains = sum(work.bounds(H200, shape.dtype)["chain"] for work in step.works)
    return {
        "problem": name,
        "nodes": shape.nodes,
        "kept": kept,
        "GEMM ms": 1e3 * gemm,
        "bound ms": 1e3 * bound,
        "bound / GEMM": bound / gemm,
        "chains / GEMM": chains / gemm,
        "GB": sum(work.read + work.written for work in step.works) / 1e9,
        "rows of a chunk": step.chunk_rows,
        "groups": step.calls["node_rows"],
        "chunks forward": step.calls["symbol_scores"],
        "chunks backward": step.calls["logit_gradient"],
        "launches": step.launches,
        "host ms": step.host_calls * config.host_microseconds / 1e3,
    }


def rows_of(shape: Shape, step: Step) -> list[dict[str, Any]]:
    """A row a kernel and phase; kernels that cost next to nothing share one."""
    gemm = gemm_alone(shape, H200)
    rest = Work("all others", "score", calls=0)
    rows = []
    for work in step.works:
        if work.seconds(H200, shape.dtype) < _SMALL * gemm:
            rest += work
        else:
            rows.append(_row(work, shape, gemm))
    return [*rows, _row(rest, shape, gemm) | {"phase": "both"}]


def _row(work: Work, shape: Shape, gemm: float) -> dict[str, Any]:
    bounds = work.bounds(H200, shape.dtype)
    limit, seconds = max(bounds.items(), key=lambda item: item[1])
    milliseconds = {f"{name} ms": 1e3 * each or None for name, each in bounds.items()}
    return {
        "phase": work.phase,
        "kernel": work.kernel,
        "launches": work.launches,
        "GB read": work.read / 1e9,
        "GB written": work.written / 1e9,
        "GEMM TFLOP": work.flops / 1e12 or None,
        "T instructions": work.instructions / 1e12 or None,
        "float64 T instructions": work.fp64_instructions / 1e12 or None,
        **milliseconds,
        "limit": limit,
        "/ GEMM": seconds / gemm,
    }


@dataclass(frozen=True)
class KernelUsage:
    """What ptxas gave a kernel of one source and architecture."""

    kernel: str
    macros: str
    architecture: str
    registers: int
    spill_bytes: int
    stack_bytes: int


def kernel_usages(architectures: Sequence[str]) -> list[KernelUsage]:
    """Every kernel for every dtype and activation, compiled or from the cache."""
    found = []
    for source in precompile(architectures=architectures):
        found += _usages_of(source)
    return found


def _usages_of(source: Precompiled) -> list[KernelUsage]:
    compiler = CudaCompiler(source.architecture)
    log = build(KernelSource(source.name, source.macros), compiler).compiled.log
    stacks: dict[str, int] = {}
    kernel = ""
    for entry, stack in _STACK.findall(log):
        kernel = entry or kernel
        stacks[kernel] = max(stacks.get(kernel, 0), int(stack or 0))
    macros = " ".join(f"{name}={value}" for name, value in source.macros)
    return [
        KernelUsage(
            usage.kernel,
            macros,
            source.architecture,
            usage.registers,
            usage.spill_bytes,
            stacks[usage.kernel],
        )
        for usage in usages(log)
    ]


def resident_warps(registers: int, warps_of_block: int = 8) -> int:
    """Warps of a Hopper multiprocessor, of 64, that registers leave room for."""
    registers_of_warp = -(-registers * 32 // 256) * 256
    warps = min(64, 4 * (16384 // registers_of_warp))
    return warps // warps_of_block * warps_of_block


def usage_rows(found: Sequence[KernelUsage], *, by_macros: bool) -> list[dict[str, Any]]:
    """A row a kernel, or a kernel and its macros; the most registers, spills and stack."""

    def key(usage: KernelUsage) -> tuple[str, ...]:
        return (usage.kernel, usage.macros) if by_macros else (usage.kernel,)

    rows = []
    for each in sorted({key(usage) for usage in found}):
        row: dict[str, Any] = dict(zip(("kernel", "macros"), each, strict=False))
        for architecture in dict.fromkeys(usage.architecture for usage in found):
            those = [u for u in found if key(u) == each and u.architecture == architecture]
            row[architecture] = _cell(those)
            if architecture == "sm_90a":
                warps = sorted(resident_warps(usage.registers) for usage in those)
                row["warps of 64"] = "–".join(str(w) for w in dict.fromkeys((warps[0], warps[-1])))
        rows.append(row)
    return rows


def _cell(usages: Sequence[KernelUsage]) -> str:
    registers = max(usage.registers for usage in usages)
    spills = max(usage.spill_bytes for usage in usages)
    stack = max(usage.stack_bytes for usage in usages)
    return f"{registers} ({spills} + {stack} B)" if spills or stack else str(registers)


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    summaries, costs = [], {}
    for name, shape in shapes(config).items():
        for kept in config.kept:
            step = count_step(shape, kept)
            summaries.append(summary_of(name, shape, kept, step, config))
            costs[f"{name}, kept {kept:g}"] = rows_of(shape, step)
    print(f"Counted, not measured. Rates of an {H200.name}.")
    print(
        f"Chains: {H200.diagonal_cycles:g} cycles for each anti-diagonal of the recursion, "
        f"{H200.gather_seconds * 1e6:g} µs for each row that a segment's sum waits for: estimates. "
        f"Host: {config.host_microseconds:g} µs a call, an assumption."
    )
    stale = stale_counts()
    if stale:
        print(stale)
    print(f"\n{markdown_table(summaries)}")
    for title, rows in costs.items():
        print(f"\n{title}\n\n{markdown_table(rows)}")
    results: dict[str, Any] = {
        "gpu": H200.name,
        "measured": "nothing: counted on a machine without a GPU",
        "stale": stale,
        "summary": summaries,
        "costs": costs,
    }
    if config.architectures:
        found = kernel_usages(config.architectures)
        print(
            "\nRegisters of a thread (bytes spilled + bytes of stack), the most over dtypes and "
            "activations; warps of 64 that they leave on an sm_90a multiprocessor in blocks of "
            f"256 threads\n\n{markdown_table(usage_rows(found, by_macros=False))}"
        )
        results["registers"] = usage_rows(found, by_macros=True)
    write_results(config.out, "kernels", config, results, device=None)


if __name__ == "__main__":
    main(parse(Config, __doc__))
