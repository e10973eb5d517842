"""Time and memory of the loss on a GPU, beside one GEMM and other ways to the same gradients.

Forward and backward with the gradients of encoder, predictor, weight and bias. Each way is first
compared with float64, on a small problem and on two samples of the batch: one that differs or fails
says so in its row and is not timed. All others take turns within a round, timed by CUDA events. The
JSON is written after every check and every round. On a CPU toy sizes try the script.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from command_line import parse
from on_device import (
    GIB,
    MIB,
    chosen_device,
    device_bytes,
    real_lengths,
    results_folder,
)
from posteriors import train
from rivals import (
    Gradients,
    batched_gradients,
    flash_gradients,
    gemm,
    torchaudio_gradients,
    torchaudio_loss,
    torchaudio_pieces,
)
from speed_gate import Candidate, Truth, check, first_line

import rnnt_op
from rnnt_op.memory import Workload, batched_bytes, held
from rnnt_op.tools.study.measure import (
    interleaved_seconds,
    is_gpu,
    median_ratio,
    seconds_on,
)
from rnnt_op.tools.study.problems import Problem, random_joint
from rnnt_op.tools.study.report import (
    describe_machine,
    markdown_table,
    results_path,
    write_record,
)

GEMM = "one GEMM"
GEMM_TO_FLOAT = "the same GEMM with a float32 result"
TORCHAUDIO = "joint network + torchaudio"
PLAIN = "plain torch"
FLASH = "Flash RNN-T"
OURS = "rnnt_op"

GEMM_BAR, SPEED_BAR, MEMORY_BAR = 4.0, 6.0, 20.0

CaseName = Literal["i", "ii", "iii"]
RivalName = Literal["all", "none", "torchaudio", "batched", "flash"]


@dataclass(frozen=True)
class Config:
    """Time and memory of forward and backward."""

    cases: tuple[CaseName, ...] = ("i", "ii", "iii")
    """i: B=32, T=400, U=128, V=1024, H=640 in bfloat16; ii: B=64 LibriSpeech lengths, V=500, H=512
    in bfloat16; iii: i in float32."""
    rivals: tuple[RivalName, ...] = ("all",)
    workspaces_mib: tuple[int, ...] = ()
    """Workspaces with which the loss is measured beside the default one."""
    lengths: Path | None = None
    """LibriSpeech lengths, an .npy file of [n, 2]; else from RNNT_OP_LENGTHS."""
    repeats: int = 10
    training_steps: int = 40
    """Adam steps on the batch that make the trained posterior; 0: none is measured."""
    gemm_limit_gib: float = 16.0
    """A GEMM whose result is larger goes in chunks of 64k rows into one buffer."""
    device: str = "auto"
    seed: int = 0
    name: str = "speed"
    """Of the JSON."""
    out: Path | None = None
    """Folder of the JSON; by default benchmarks/results on a GPU, none on a CPU."""


def cases(config: Config, device: str) -> dict[str, Workload]:
    """The cases asked for, by what they are called; at toy sizes on a CPU."""
    toy = not is_gpu(device)
    found = {}
    for name in config.cases:
        if name == "ii":
            lengths = real_lengths(config.lengths, 4 if toy else 64)
            if isinstance(lengths, str):
                print(f"(ii) left out: {lengths}\n")
                continue
            if toy:
                lengths = tuple((1 + t // 20, u // 10) for t, u in lengths)
            model = (30, 16) if toy else (500, 512)
        else:
            lengths = ((20, 8),) * 3 if toy else ((400, 128),) * 32
            model = (48, 24) if toy else (1024, 640)
        workload = Workload(lengths, *model, torch.float32 if name == "iii" else torch.bfloat16)
        found[f"({name}) {workload}"] = workload
    return found


def ours(problem: Problem, workspace_bytes: int | None = None) -> Gradients:
    return problem.gradients(partial(rnnt_op.joint_rnnt_loss, workspace_bytes=workspace_bytes))


def candidates(
    problem: Problem, config: Config, device: str
) -> tuple[dict[str, Candidate], list[str]]:
    """All that compute loss and gradients, and why others are left out."""
    limit, left_out = 0.7 * device_bytes(device), []
    found = {f"{OURS}, random": Candidate(ours, problem)}
    if config.training_steps:
        name = f"trained {config.training_steps} steps"
        try:
            [trained] = train(problem, (config.training_steps,)).values()
            found[f"{OURS}, {name}"] = Candidate(ours, trained)
        except Exception as error:  # the others are measured all the same
            left_out.append(f"{OURS}, {name}: {first_line(error)}")
    for mib in config.workspaces_mib:
        workspace = mib * MIB
        on = str(problem.leaves[0].device)
        chunk = held(OURS, problem.workload, workspace_bytes=workspace, device=on)
        planned = sum(each.bytes for each in chunk if each.name.startswith("chunk"))
        note = f"a chunk takes {planned / MIB:.3g} MiB"
        way = partial(ours, workspace_bytes=workspace)
        found[f"{OURS}, workspace {mib} MiB"] = Candidate(way, problem, note)

    def wanted(name: str) -> bool:
        return name in config.rivals or "all" in config.rivals

    if wanted("torchaudio"):
        try:
            torchaudio_loss(str(problem.leaves[0].device))
            pieces = torchaudio_pieces(problem.workload, limit)
            note = f"in {pieces} pieces" if pieces > 1 else ""
            way = partial(torchaudio_gradients, limit)
            found[TORCHAUDIO] = Candidate(way, problem, note)
        except RuntimeError as reason:
            left_out.append(f"{TORCHAUDIO}: {reason}")
    if wanted("flash"):
        found[FLASH] = Candidate(flash_gradients, problem)
    if wanted("batched"):
        needed = batched_bytes(problem.workload)
        if needed <= limit:
            found[PLAIN] = Candidate(batched_gradients, problem)
        else:
            left_out.append(f"{PLAIN}: it needs {needed / GIB:.0f} GiB")
    return found, left_out


def measure(
    case: str,
    workload: Workload,
    config: Config,
    device: str,
    save: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
    """Prints one case's table; returns all numbers, and gives them to ``save`` as they come."""
    dtype, problem = workload.dtype, random_joint(workload, device=device)
    result: dict[str, Any] = {"case": case, "nodes": problem.nodes, "rows": [], "seconds": {}}

    found, result["left out"] = candidates(problem, config, device)
    functions: dict[str, Callable[[], object]] = {}
    notes = {}
    dtypes = {GEMM: dtype}
    if is_gpu(device) and dtype != torch.float32:
        dtypes[GEMM_TO_FLOAT] = torch.float32
    for name, result_dtype in dtypes.items():
        try:
            run, notes[name] = gemm(problem, result_dtype, config.gemm_limit_gib * GIB)
            run()
            functions[name] = run
        except Exception as error:
            result["left out"].append(f"{name}: {first_line(error)}")

    def update(seconds: dict[str, list[float]]) -> None:
        names = [*functions, *(name for name in found if name not in functions)]
        result["rows"] = [row(name, found.get(name), notes, seconds) for name in names]
        result["seconds"] = seconds
        result["wrong"] = [name for name, each in found.items() if each.wrong]
        if GEMM in seconds:
            flops = 2 * workload.nodes * workload.vocab_size * workload.joint_dim
            result["GEMM TFLOP/s"] = flops / median(seconds[GEMM]) / 1e12
        result["bars"] = [
            bars_of(name, seconds, found, device) for name in seconds if name.startswith(OURS)
        ]
        save(result)

    truths: dict[int, Truth | None] = {}
    for name, candidate in found.items():
        key = id(candidate.problem)
        if key not in truths:
            try:
                truths[key] = Truth(candidate.problem)
            except Exception as error:  # the small problem is compared all the same
                truths[key] = None
                result["left out"].append(f"comparison of this batch: {first_line(error)}")
        check(candidate, truths[key], device, is_ours=name.startswith(OURS))
        if is_gpu(device):
            torch.cuda.empty_cache()
        if not candidate.wrong:
            functions[name] = candidate.run
        update({})
    truths.clear()
    seconds = interleaved_seconds(
        functions, repeats=config.repeats, seconds_of=seconds_on(device), after_round=update
    )
    update(seconds)
    print(f"\n{case}\n\n{markdown_table(result['rows'])}")
    rate = result.get("GEMM TFLOP/s", float("nan"))
    print(f"\n{problem.nodes} nodes; {GEMM}: {rate:.3g} TFLOP/s")
    if result["bars"]:
        print(f"\n{markdown_table(result['bars'])}")
    for reason in result["left out"]:
        print(f"\nLeft out, {reason}")
    return result


def row(
    name: str,
    candidate: Candidate | None,
    notes: dict[str, str],
    seconds: dict[str, list[float]],
) -> dict[str, Any]:
    """What is known of a candidate, or of a GEMM; None of what was not measured."""
    times, gemm_times = seconds.get(name), seconds.get(GEMM)
    taken = candidate.bytes if candidate else None
    return {
        "what": name,
        "nodes kept %": candidate.kept_percent if candidate else None,
        "median ms": 1e3 * median(times) if times else None,
        "fastest ms": 1e3 * min(times) if times else None,
        "slowest ms": 1e3 * max(times) if times else None,
        f"× {GEMM}": median_ratio(times, gemm_times) if times and gemm_times else None,
        "MiB above inputs and gradients": None if taken is None else taken / MIB,
        "error of two samples' gradients": candidate.error if candidate else None,
        "note": (candidate.wrong or candidate.note) if candidate else notes[name],
    }


def bars_of(
    ours: str, seconds: dict[str, list[float]], found: dict[str, Candidate], device: str
) -> dict[str, Any]:
    def passes(value: float | None, bar: float, most: bool = False) -> bool | None:
        """None where there is nothing to compare, or no GPU that the bar is meant for."""
        if value is None or not is_gpu(device):
            return None
        return value <= bar if most else value >= bar

    def times_faster(other: str) -> float | None:
        return median_ratio(seconds[other], seconds[ours]) if other in seconds else None

    def times_less(other: str) -> float | None:
        theirs = found[other].bytes if other in seconds else None
        own = found[ours].bytes
        if theirs is None or own is None or own <= 0:  # toy sizes are below what a CPU shows
            return None
        return theirs / own

    a = median_ratio(seconds[ours], seconds[GEMM]) if GEMM in seconds else None
    b, b_memory = times_faster(TORCHAUDIO), times_less(TORCHAUDIO)
    return {
        "what": ours,
        f"(a) / {GEMM}": a,
        f"a ≤ {GEMM_BAR:g}": passes(a, GEMM_BAR, most=True),
        "(b) × faster than torchaudio": b,
        f"b ≥ {SPEED_BAR:g}": passes(b, SPEED_BAR),
        "(b) × less memory": b_memory,
        f"memory ≥ {MEMORY_BAR:g}": passes(b_memory, MEMORY_BAR),
        "(c) × faster than plain torch": times_faster(PLAIN),
        "(c) × less memory": times_less(PLAIN),
        f"(d) × faster than {FLASH}": times_faster(FLASH),
        "(d) × less memory ": times_less(FLASH),
    }


def failures(results: Sequence[dict[str, Any]]) -> list[str]:
    """What differs from the truth, failed, or does not meet its bar."""
    found = [f"{result['case']}: {result['failed']}" for result in results if "failed" in result]
    for result in results:
        found += [f"{result['case']}, {name} is wrong" for name in result.get("wrong", ())]
        for bars in result.get("bars", ()):
            missed = [name for name, passed in bars.items() if passed is False]
            found += [f"{result['case']}, {bars['what']}: {name} not met" for name in missed]
    return found


def main(config: Config) -> None:
    device = chosen_device(config.device)
    torch.manual_seed(config.seed)
    print(f"Forward + backward; {describe_machine(device)}")
    if not is_gpu(device):
        print("Toy sizes on a CPU: the script is tried, nothing is measured.")
    out = results_folder(config.out, device)
    results: list[dict[str, Any]] = []
    name = config.name if is_gpu(device) else f"{config.name}-toy"
    record = replace(config, device=device)

    def save(latest: dict[str, Any]) -> None:
        if out is not None:
            path = results_path(out, name, device)
            write_record(path, record, [*results, latest], device=device)

    for case, workload in cases(config, device).items():
        result: dict[str, Any] = {"case": case}

        def keep(latest: dict[str, Any], result: dict[str, Any] = result) -> None:
            result.update(latest)
            save(result)

        try:
            measure(case, workload, config, device, keep)
        except Exception as error:  # the next case may well run
            keep({"failed": first_line(error)})
        results.append(result)
        if is_gpu(device):
            torch.cuda.empty_cache()
    failed = failures(results)
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main(parse(Config, __doc__))
