"""Results as a Markdown table and as JSON with machine, versions, date and parameters."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import rnnt_op

Row = Mapping[str, Any]

GB = 1e9  # bytes


def markdown_table(rows: Sequence[Row]) -> str:
    """A Markdown table whose columns are the keys of the first row."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row[c]) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """How a table shows a value."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "pass" if value else "**FAIL**"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"
    return str(value)


def write_results(
    out: Path,
    name: str,
    parameters: Any,
    results: Mapping[str, Any] | Sequence[Row],
    *,
    device: str | None = "cpu",
) -> None:
    """Writes ``out/name-{cpu,cuda}.json``, or ``out/name.json`` where no device is concerned."""
    path = results_path(out, name, device)
    write_record(path, parameters, results, device=device)
    print(f"\nwrote {path}", file=sys.stderr)


def results_path(out: Path, name: str, device: str | None) -> Path:
    """Where ``write_results`` writes."""
    kind = None if device is None else torch.device(device).type
    return out / (f"{name}.json" if kind is None else f"{name}-{kind}.json")


def write_record(
    path: Path,
    parameters: Any,
    results: Mapping[str, Any] | Sequence[Row],
    *,
    device: str | None,
) -> None:
    """Writes results as JSON with machine, versions and date.

    Args:
        parameters: what was asked for, a dataclass.
        device: None: none is concerned.
    """
    record: dict[str, Any] = {
        "machine": _machine(None if device is None else torch.device(device).type),
        "versions": {
            "rnnt_op": rnnt_op.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "parameters": dataclasses.asdict(parameters),
        "results": results,
    }
    record["parameters"].pop("out", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Readers see the whole file, also where a later write is cut short.
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(record, indent=2, default=_file_name) + "\n")
    draft.replace(path)


def _file_name(path: Path) -> str:
    # Where a file lies says nothing about the measurement.
    return path.name


def _machine(kind: str | None) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "kind": kind or "any",
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if kind == "cuda":
        properties = torch.cuda.get_device_properties()
        machine["gpu"] = properties.name
        machine["gpu_memory_bytes"] = properties.total_memory
        machine["multiprocessors"] = properties.multi_processor_count
        machine["cuda"] = torch.version.cuda
    return machine


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def describe_machine(device: str = "cpu") -> str:
    """One line for the head of a table."""
    machine = _machine(torch.device(device).type)
    if "gpu" in machine:
        return f"{machine['gpu']}, CUDA {machine['cuda']}, torch {torch.__version__}"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {torch.__version__}"
    )
