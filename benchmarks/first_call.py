"""How long a user waits for the first loss of a process: kernels compiled, or found in the cache.

Each measurement is a fresh process that has imported torch and made its tensors. Timed are
``import rnnt_op`` and the first forward and backward, with an empty and with a warm kernel cache.
Without a GPU the CPU's are measured, and of the GPU's what needs none: the compilation of all
kernels of one dtype and activation, or finding them in the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from command_line import parse
from on_device import chosen_device

from rnnt_op.tools.study.measure import is_gpu
from rnnt_op.tools.study.problems import DtypeName
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

EMPTY_BAR, WARM_BAR = 3.0, 0.2  # seconds, on a GPU

_FIRST_LOSS = """
import json, sys, time
import torch
dtype, library_first, device = getattr(torch, sys.argv[1]), sys.argv[2] == "1", sys.argv[3]
leaf = lambda *size: torch.randn(size, device=device).to(dtype).requires_grad_()
wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
leaves = leaf(4, 100, 640), leaf(4, 21, 640), leaf(1024, 640), leaf(1024)
targets = torch.randint(1, 1024, (4, 20), device=device)
lengths = torch.full((4,), 100), torch.full((4,), 20)
if library_first:  # what any model has done before its loss
    torch.mm(leaves[2], leaves[2].t())
wait()

def loss():
    start = time.perf_counter()
    torch.autograd.grad(rnnt_op.joint_rnnt_loss(*leaves, targets, *lengths), leaves)
    wait()
    return time.perf_counter() - start

start = time.perf_counter()
import rnnt_op
imported = time.perf_counter() - start
print(json.dumps({"import": imported, "first": loss(), "second": loss()}))
"""

_KERNELS_ALONE = """
import json, sys, time
import torch
start = time.perf_counter()
import rnnt_op
imported = time.perf_counter() - start
start = time.perf_counter()
from rnnt_op.precompile import precompile
found = precompile(
    dtypes=[getattr(torch, sys.argv[1])], activations=["tanh"], architectures=[sys.argv[2]]
)
elapsed = time.perf_counter() - start
cached = sum(kernel.cached for kernel in found)
print(json.dumps({"import": imported, "first": elapsed, "sources": len(found), "cached": cached}))
"""


@dataclass(frozen=True)
class Config:
    """Time of the first call."""

    dtypes: tuple[DtypeName, ...] = ("bfloat16", "float32")
    architecture: str = "sm_90a"
    """What kernels are compiled for where there is no GPU."""
    repeats: int = 3
    device: str = "auto"
    out: Path | None = None
    """Folder of the JSON; by default benchmarks/results."""


def in_fresh_process(code: str, cache: Path, *arguments: str) -> dict[str, Any]:
    """What the code prints, run with that kernel cache."""
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "RNNT_OP_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        raise SystemExit(f"the measured process failed:\n{process.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def measure(code: str, *arguments: str, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Runs with an empty cache each, and runs with the last one's cache."""
    with tempfile.TemporaryDirectory() as folder:
        caches = [Path(folder) / str(i) for i in range(repeats)]
        empty = [in_fresh_process(code, cache, *arguments) for cache in caches]
        warm = [in_fresh_process(code, caches[-1], *arguments) for _ in range(repeats)]
    return {"empty": empty, "warm": warm}


def row_of(what: str, cache: str, runs: list[dict[str, Any]], has_bar: bool) -> dict[str, Any]:
    bar = EMPTY_BAR if cache == "empty" else WARM_BAR
    seconds = [run["import"] + run["first"] for run in runs]
    second = [run["second"] for run in runs if "second" in run]
    return {
        "what": what,
        "cache": cache,
        "import s": median(run["import"] for run in runs),
        "first s": median(run["first"] for run in runs),
        "import + first s": median(seconds),
        "slowest s": max(seconds),
        "bar s": bar,
        "passed": median(seconds) <= bar if has_bar else None,
        "second s": median(second) if second else None,
    }


def main(config: Config) -> None:
    device = chosen_device(config.device)
    rows: list[dict[str, Any]] = []
    runs: dict[str, Any] = {}
    out = Path("benchmarks/results") if config.out is None else config.out
    record = replace(config, device=device)
    measured = "import rnnt_op, then the first loss and gradients, until they are there"
    if not is_gpu(device):
        measured += (
            "; where kernels are compiled alone, NVRTC's compilation of the kernels of one dtype "
            "and activation, or finding them in the cache: no GPU here, so none is loaded"
        )
    for dtype in config.dtypes:
        variants: dict[str, tuple[str, tuple[str, ...]]] = {
            f"{dtype}, loss and gradients": (_FIRST_LOSS, (dtype, "0", device)),
            f"{dtype}, the same after a GEMM of torch": (_FIRST_LOSS, (dtype, "1", device)),
        }
        if not is_gpu(device):
            what = f"{dtype}, all kernels for {config.architecture}, compiled alone"
            variants[what] = (_KERNELS_ALONE, (dtype, config.architecture))
        for what, (code, arguments) in variants.items():
            runs[what] = measure(code, *arguments, repeats=config.repeats)
            rows += [
                row_of(what, cache, each, is_gpu(device)) for cache, each in runs[what].items()
            ]
            results = {"measured": measured, "rows": rows, "runs": runs}
            write_results(out, "first-call", record, results, device=device)
    print(f"In a fresh process after import torch; {describe_machine(device)}\n\n{measured}\n")
    print(markdown_table(rows))
    failed = [f"{row['what']}, {row['cache']} cache" for row in rows if row["passed"] is False]
    if failed:
        raise SystemExit("slower than the bar: " + "; ".join(failed))


if __name__ == "__main__":
    main(parse(Config, __doc__))
