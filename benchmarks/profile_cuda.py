"""Where the time of a training step goes on a GPU, and how far each kernel is from its ceiling.

torch.profiler's trace of a few steady steps gives each kernel's calls and time, and when the GPU
had nothing to do. Bytes and operations are counted (``cost_model``), and divided by copy bandwidth
and GEMM rate measured in the same process. On a CPU it prints torch's operations by time, at a toy
size.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from command_line import parse
from cost_model import H200, Gpu, Work, stale_counts
from dry_run import count_step
from on_device import (
    GIB,
    OUR_KERNELS,
    chosen_device,
    real_lengths,
    results_folder,
)
from posteriors import train
from torch.profiler import ProfilerActivity

import rnnt_op
from rnnt_op.memory import Lengths, Workload
from rnnt_op.tools.study.correctness import op_wrong_by
from rnnt_op.tools.study.measure import is_gpu, kept_fraction, seconds_by_events, wall_clock_seconds
from rnnt_op.tools.study.problems import DtypeName, Problem, dtype_of, random_joint
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

# What a trace calls a GEMM of cuBLAS depends on its version.
_GEMM = re.compile(r"gemm|nvjet|cutlass|xmma|splitk|gemv", re.IGNORECASE)
_SUM = re.compile(r"reduce_kernel")
Results = dict[str, Any]

_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True)
class Config:
    """One batch, profiled over some steps."""

    batch: int | None = None
    """None, here and below: 32 × (400, 128), V=1024, H=640 on a GPU, a toy's on a CPU."""
    frames: int | None = None
    labels: int | None = None
    vocab_size: int | None = None
    joint_dim: int | None = None
    librispeech: bool = False
    """LibriSpeech lengths, V=500, H=512 and B=64 instead."""
    lengths: Path | None = None
    """LibriSpeech lengths, an .npy file of [n, 2]; else from RNNT_OP_LENGTHS."""
    dtype: DtypeName = "bfloat16"
    training_steps: int = 0
    """Adam steps on the batch first, for a confident posterior."""
    steps: int = 5
    device: str = "auto"
    seed: int = 0
    out: Path | None = None
    """Folder of the JSON; by default benchmarks/results on a GPU, none on a CPU."""


FULL = {"batch": 32, "frames": 400, "labels": 128, "vocab_size": 1024, "joint_dim": 640}
LIBRISPEECH = {**FULL, "batch": 64, "vocab_size": 500, "joint_dim": 512}
TOY = {"batch": 3, "frames": 30, "labels": 9, "vocab_size": 48, "joint_dim": 24}


@dataclass(frozen=True)
class Event:
    """Something that a GPU did, in microseconds."""

    name: str
    start: float
    duration: float


def problem_of(config: Config, device: str) -> Problem:
    defaults = LIBRISPEECH if config.librispeech else FULL if is_gpu(device) else TOY
    asked = {name: getattr(config, name) for name in defaults}
    size = {name: defaults[name] if value is None else value for name, value in asked.items()}
    lengths: Lengths = ((size["frames"], size["labels"]),) * size["batch"]
    if config.librispeech:
        drawn = real_lengths(config.lengths, size["batch"])
        if isinstance(drawn, str):
            raise SystemExit(drawn)
        lengths = drawn
    workload = Workload(lengths, size["vocab_size"], size["joint_dim"], dtype_of(config.dtype))
    problem = random_joint(workload, device=device)
    if config.training_steps:
        [problem] = train(problem, (config.training_steps,)).values()
    return problem


def measured_gpu() -> Gpu:
    """The GPU of this process, with the rates that a copy and GEMMs reach on it now."""
    properties = torch.cuda.get_device_properties()

    def copy_rate() -> float:
        source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda").random_()
        copy = torch.empty_like(source)
        return 2 * source.nbytes / _typical(lambda: copy.copy_(source))

    def gemm_rate(dtype: torch.dtype) -> float:
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * 8192**3 / _typical(lambda: torch.mm(a, b, out=out))

    return replace(
        H200,
        name=f"{properties.name}: copy and GEMM rates measured here, others of an H200",
        bytes=copy_rate(),
        bf16_flops=gemm_rate(torch.bfloat16),
        fp32_flops=gemm_rate(torch.float32),
        multiprocessors=properties.multi_processor_count,
    )


def _typical(function: Callable[[], object]) -> float:
    for _ in range(3):
        function()
    return median(seconds_by_events(function) for _ in range(10))


def gpu_events(run: Callable[[], object], steps: int) -> list[Event]:
    """What the GPU does in some runs, in order."""
    run()
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return events_of(json.loads(trace.read_text()))


def events_of(trace: dict[str, Any]) -> list[Event]:
    """Kernels, copies and fills of a Chrome trace, by their start."""
    found = [
        Event(event["name"], float(event["ts"]), float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in _ON_GPU
    ]
    return sorted(found, key=lambda event: event.start)


def kind_of(name: str) -> str:
    """The row that a kernel of the trace is counted in."""
    if name in OUR_KERNELS:
        return name
    if _GEMM.search(name):
        return "GEMMs"
    return "torch: sum" if _SUM.search(name) else "torch: others"


def kind_of_work(work: Work) -> str:
    """The same for what was counted."""
    if work.kernel.startswith("GEMM"):
        return "GEMMs"
    if work.kernel == "copy to the host":
        return "torch: others"
    return work.kernel.partition(" (")[0]


def idle_share(events: Sequence[Event]) -> tuple[float, float]:
    """Share of the window from first to last event in which the GPU did nothing; the window."""
    busy, end = 0.0, events[0].start
    for event in events:
        stop = event.start + event.duration
        busy += max(0.0, stop - max(end, event.start))
        end = max(end, stop)
    window = end - events[0].start
    return 1 - busy / window, window


def kernel_rows(
    events: Sequence[Event], works: Sequence[Work], steps: int, gpu: Gpu, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row a kernel, by time; bytes and operations are those of one step."""
    times: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in events:
        times[kind_of(event.name)] += event.duration / steps / 1e6
        calls[kind_of(event.name)] += 1
    counted: dict[str, Work] = {}
    bounds: dict[str, float] = defaultdict(float)
    for work in works:
        kind = kind_of_work(work)
        counted[kind] = counted[kind] + work if kind in counted else work
        bounds[kind] += work.seconds(gpu, dtype)
    total = sum(times.values())
    rows = []
    for kind, seconds in sorted(times.items(), key=lambda item: -item[1]):
        work = counted.get(kind, Work(kind, "score"))
        moved = work.read + work.written
        limit = (
            max(work.bounds(gpu, dtype).items(), key=lambda item: item[1])[0]
            if moved
            else "not counted"
        )
        rows.append(
            {
                "kernel": kind,
                "calls a step": calls[kind] / steps,
                "counted": work.launches,
                "ms a step": 1e3 * seconds,
                "share %": 100 * seconds / total,
                "GB": moved / 1e9,
                "TB/s": moved / seconds / 1e12,
                "% of copy": 100 * moved / seconds / gpu.bytes,
                "GEMM TFLOP": work.flops / 1e12 or None,
                "TFLOP/s": work.flops / seconds / 1e12 or None,
                "% of GEMM rate": 100 * work.flops / seconds / gpu.gemm_flops(dtype) or None,
                "limit": limit,
                "bound ms": 1e3 * bounds[kind],
                "% of bound": 100 * bounds[kind] / seconds,
            }
        )
    return rows


def verdict(rows: Sequence[dict[str, Any]], idle: float, window_ms: float) -> str:
    """What to look at next: the most time above a bound, or the gaps between kernels."""

    def excess(row: dict[str, Any]) -> float:
        return float(row["ms a step"] - min(row["bound ms"], row["ms a step"]))

    largest, slackest = rows[0], max(rows, key=excess)
    lines = [
        f"Largest share: {largest['kernel']}, {largest['share %']:.0f} % of the kernels' time, at "
        f"{largest['% of bound']:.0f} % of its bound ({largest['limit']})."
    ]
    idle_ms = idle * window_ms
    if idle_ms > excess(slackest):
        lines.append(
            f"Next bottleneck: the GPU waits {idle_ms:.2f} ms a step, more than any kernel loses: "
            "launches and the host."
        )
    else:
        lines.append(
            f"Next bottleneck: {slackest['kernel']}, {excess(slackest):.2f} ms a step above its "
            f"bound ({slackest['limit']}), of which it reaches {slackest['% of bound']:.0f} %."
        )
    return "\n".join(lines)


def profile_gpu(
    config: Config, problem: Problem, run: Callable[[], object], save: Callable[[Results], object]
) -> Results:
    events = gpu_events(run, config.steps)
    if not events:
        raise SystemExit("the trace holds no kernels: may this process use CUPTI?")
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        by_name[event.name].append(event.duration)
    names = {
        name: {"calls": len(each), "milliseconds": sum(each) / 1e3, "row": kind_of(name)}
        for name, each in sorted(by_name.items(), key=lambda item: -sum(item[1]))
    }
    save({"kernels": names})  # what was measured, before anything is made of it
    gpu, dtype = measured_gpu(), dtype_of(config.dtype)
    kept = kept_fraction(problem, run)
    step = count_step(problem.workload, kept, gpu)
    rows = kernel_rows(events, step.works, config.steps, gpu, dtype)
    idle, window = idle_share(events)
    window_ms = window / 1e3 / config.steps
    ceilings = {
        "copy TB/s": gpu.bytes / 1e12,
        "bfloat16 GEMM TFLOP/s": gpu.bf16_flops / 1e12,
        "float32 GEMM TFLOP/s": gpu.fp32_flops / 1e12,
        "nodes kept %": 100 * kept,
        "ms a step": window_ms,
        "GPU idle %": 100 * idle,
    }
    print(f"{markdown_table([ceilings])}\n\n{markdown_table(rows)}")
    if stale_counts():
        print(f"\n{stale_counts()}")
    conclusion = verdict(rows, idle, window_ms)
    print(f"\n{conclusion}")
    return {"ceilings": ceilings, "rows": rows, "verdict": conclusion, "kernels": names}


def profile_cpu(config: Config, run: Callable[[], object]) -> Results:
    run()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = wall_clock_seconds(lambda: [run() for _ in range(config.steps)])
    averages = sorted(profiler.key_averages(), key=lambda op: -op.self_cpu_time_total)
    total = sum(op.self_cpu_time_total for op in averages)
    rows = [
        {
            "operation": op.key,
            "calls a step": op.count / config.steps,
            "ms a step": op.self_cpu_time_total / 1e3 / config.steps,
            "share %": 100 * op.self_cpu_time_total / total,
        }
        for op in averages[:20]
    ]
    print(f"{markdown_table(rows)}\n\n{1e3 * seconds / config.steps:.3g} ms a step, profiled")
    return {"rows": rows}


def main(config: Config) -> None:
    device = chosen_device(config.device)
    torch.manual_seed(config.seed)
    # Where the time goes is worth knowing of a wrong loss, too.
    wrong = op_wrong_by(dtype_of(config.dtype), device)
    problem = problem_of(config, device)
    print(f"{problem.workload}; {describe_machine(device)}\n")
    out = results_folder(config.out, device)
    record = replace(config, device=device)

    def run() -> object:
        return problem.gradients(rnnt_op.joint_rnnt_loss)

    def save(results: Results) -> None:
        if out is not None:
            name = "profile" if is_gpu(device) else "profile-toy"
            write_results(out, name, record, {"wrong": wrong, **results}, device=device)

    if is_gpu(device):
        save(profile_gpu(config, problem, run, save))
    else:
        print("On a CPU: torch's operations; no kernel of csrc runs here.\n")
        save(profile_cpu(config, run))
    if wrong is not None:
        raise SystemExit(f"wrong result in {config.dtype} on {device}: {wrong}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
