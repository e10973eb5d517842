"""A step's launches, from the engine run over tensors without data, and what they take on paper.

    python benchmarks/dry_run.py

Plan, engine and CUDA backend are the real ones. Tensors are on torch's meta device, and a stand-in
for the CUDA device notes kernels and GEMMs instead of launching them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cost_model
import torch
from cost_model import Gpu, Phase, Rows, Work
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rnnt_op.backends.cuda import CudaBackend
from rnnt_op.backends.cuda_device import CudaDevice
from rnnt_op.backends.device import Shape
from rnnt_op.backends.lattice_walk import TURN, Walk
from rnnt_op.backends.records import Lattice
from rnnt_op.batch import Batch
from rnnt_op.engine import sweep
from rnnt_op.jit import Argument, KernelSource
from rnnt_op.logits import JointLogits, Wanted
from rnnt_op.memory import Workload
from rnnt_op.nodes import Nodes
from rnnt_op.task import Task
from rnnt_op.tools.study.problems import Problem
from rnnt_op.tools.study.report import markdown_table
from rnnt_op.topology import RNNT, Topology

# Torch operations that launch nothing, besides views.
_SILENT = {
    "alias",
    "detach",
    "empty",
    "empty_like",
    "lift_fresh",
    "new_empty",
    "promote_types",
    "scalar_tensor",
}
# Kernels of one call; one where not listed.
_KERNELS_OF_CALL = {"repeat_interleave": 2}
_WRITES_ONLY = {"zero_", "fill_", "copy_"}  # what they change, they do not read
_GATHERS = {"index", "index_select"}  # they read as much as they write

STEPS = {
    "B=32 T=400 U=128 V=1024 H=640": Workload(((400, 128),) * 32, 1024, 640, torch.bfloat16),
    "B=64 T=100..400 U=20..80 V=500 H=512": Workload(
        tuple((100 + 300 * i // 63, 20 + 60 * i // 63) for i in range(64)), 500, 512, torch.bfloat16
    ),
}


@dataclass(frozen=True)
class Step:
    """Loss and all gradients of a batch."""

    works: list[Work]
    calls: Counter[str]  # launches of each kernel
    chunk_rows: int

    @property
    def launches(self) -> int:
        return sum(work.launches for work in self.works)

    @property
    def host_calls(self) -> int:
        return sum(work.calls for work in self.works)


def count_step(
    workload: Workload, kept: float, gpu: Gpu = cost_model.H200, workspace_bytes: int | None = None
) -> Step:
    """Counts a forward and backward pass whose backward pass keeps a share of the nodes."""
    tape = _Tape(workload, kept, gpu)
    backend = _Backend(_Device(tape))

    def tensor(*size: int, dtype: torch.dtype = workload.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    frames, labels = [t for t, _ in workload.lengths], [u for _, u in workload.lengths]
    batch, joint_dim, vocab_size = len(frames), workload.joint_dim, workload.vocab_size
    encoder, predictor = (
        tensor(batch, max(frames), joint_dim),
        tensor(batch, max(labels) + 1, joint_dim),
    )
    weight, bias = tensor(vocab_size, joint_dim), tensor(vocab_size)
    with _TorchOperations(tape):
        targets = tensor(batch, max(labels), dtype=torch.int64)
        lengths = torch.tensor(frames), torch.tensor(labels)
        problem = Problem((encoder, predictor, weight, bias), targets, *lengths)
        source = JointLogits(backend, problem.arguments, wanted=Wanted(True, True, True, True))
        sweep(
            Task(
                backend=backend,
                topology=RNNT,
                blank=0,
                batch=Batch(targets, frames, labels, None, None),
                shard=None,
                normalize=True,
                workspace_bytes=workspace_bytes,
            ),
            source,
            weights=tensor(batch, dtype=torch.float32),
            gradient_tolerance=1e-9,
        )
        scale = tensor(dtype=torch.float32)
        for gradient in source.gradients():
            gradient.copy_(gradient * scale)
    return Step(list(tape.works.values()), tape.calls, tape.chunk_rows)


class _Tape:
    """What was launched so far, and where the engine is."""

    def __init__(self, workload: Workload, kept: float, gpu: Gpu) -> None:
        self.workload, self.kept, self.gpu = workload, kept, gpu
        self.works: dict[tuple[str, Phase], Work] = {}
        self.calls: Counter[str] = Counter()
        self.phase: Phase = "score"
        self.chunk_rows = 0
        self.group_nodes = 0
        self.logits_are_next = False

    def rows(self, count: int) -> Rows:
        kept = self.kept if self.phase == "backward" else 1.0
        return Rows(self.workload, self.phase, count, kept)

    def add(self, work: Work) -> None:
        key = work.kernel, work.phase
        self.calls[work.kernel] += work.launches
        self.works[key] = self.works[key] + work if key in self.works else work


class _Device(CudaDevice):
    """Notes what it is asked for."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__(torch.device("meta"))
        self.tape = tape

    def call(
        self, source: KernelSource, kernel: str, shape: Shape, arguments: dict[str, Argument]
    ) -> None:
        tape, processors = self.tape, self.tape.gpu.multiprocessors
        if kernel == "pack":
            tape.phase = "score"
        rows = tape.rows(_rows_of(kernel, arguments))
        if kernel == "hidden":
            tape.logits_are_next = True
            tape.chunk_rows = max(tape.chunk_rows, rows.count)
            tape.add(cost_model.hidden(rows))
        elif kernel == "symbol_scores":
            tape.add(cost_model.symbol_scores(rows))
        elif kernel == "logit_gradient":
            tape.add(cost_model.logit_gradient(rows))
        elif kernel == "joint_gradient":
            by_state = arguments["state_sample"] is not None
            tape.add(cost_model.joint_gradient(rows, by_state, shape.block[1], processors))
        elif kernel == "forward_backward":
            tape.group_nodes = rows.count
            blocks, threads = shape.grid[0] * shape.grid[1], shape.block[0]
            work = cost_model.forward_backward(rows, blocks, threads, self.steps, processors)
            tape.add(work)
        elif kernel == "write_kept":
            tape.add(cost_model.of_nodes(kernel, replace(rows, kept=tape.kept)))
        else:
            tape.add(cost_model.of_nodes(kernel, rows))

    steps = 0  # of the group whose recursion comes next

    def matmul(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        tape = self.tape
        if tape.logits_are_next:
            tape.logits_are_next = False
            tape.add(cost_model.gemm_logits(tape.rows(len(a))))
        elif a.stride(0) == 1:
            tape.add(cost_model.gemm_d_weight(tape.rows(a.shape[1])))
        else:
            tape.add(cost_model.gemm_d_hidden(tape.rows(len(a))))

    def read(self, value: Tensor) -> Callable[[], int]:
        tape, nodes = self.tape, self.tape.group_nodes
        tape.add(Work("copy to the host", tape.phase, 1))

        def wait() -> int:
            tape.phase = "backward"
            return math.ceil(tape.kept * nodes)

        return wait


def _rows_of(kernel: str, arguments: dict[str, Argument]) -> int:
    """Rows, nodes, samples or counts that a launch is for."""
    names = {
        "pack": "frame_sample",
        "node_rows": "frame",
        "thresholds": "histogram",
        "scan_counts": "length",
    }
    name = names.get(kernel, "row_count" if "row_count" in arguments else "node_count")
    argument = arguments[name]
    if isinstance(argument, Tensor):
        return len(argument)
    assert isinstance(argument, int)
    return argument


class _Backend(CudaBackend):
    def __init__(self, device: _Device) -> None:
        super().__init__(device)
        self._tape_device = device

    def forward_backward(
        self, topology: Topology, nodes: Nodes, scores: Tensor, *, occupancies: bool
    ) -> Lattice:
        group = nodes.packed.group
        lengths = zip(group.frames, group.states, strict=True)
        self._tape_device.steps = TURN * max(Walk(topology, t, s).turns for t, s in lengths)
        return super().forward_backward(topology, nodes, scores, occupancies=occupancies)


class _TorchOperations(TorchDispatchMode):
    """Notes torch operations that launch kernels."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if function.is_view or name in _SILENT:
            return result
        inputs = _tensors(args[1:] if name in _WRITES_ONLY else args)
        written = sum(t.nbytes for t in _tensors((result,)))
        read = sum(t.nbytes for t in inputs)
        if name in _GATHERS:
            read = written + sum(t.nbytes for t in inputs[1:])
        elif name == "index_put_":
            written = inputs[-1].nbytes
            read = sum(t.nbytes for t in inputs[1:])
        label = "torch: sum" if name == "sum" else "torch: others"
        launches = _KERNELS_OF_CALL.get(name, 1)
        self._tape.add(Work(label, self._tape.phase, launches, read, written))
        return result


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, tuple | list):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def bounds_of(step: Step, gpu: Gpu, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row a kernel and phase, by time: what its scarcest resource takes at least."""
    rows: list[dict[str, Any]] = []
    for work in sorted(step.works, key=lambda work: -work.seconds(gpu, dtype)):
        bounds = work.bounds(gpu, dtype)
        rows.append(
            {
                "kernel": work.kernel,
                "phase": work.phase,
                "launches": work.launches,
                "ms": 1e3 * work.seconds(gpu, dtype),
                "limit": max(bounds, key=lambda name: bounds[name]),
            }
        )
    total = sum(row["ms"] for row in rows)
    return [
        *rows,
        {"kernel": "all", "phase": "", "launches": step.launches, "ms": total, "limit": ""},
    ]


def main() -> None:
    gpu = cost_model.H200
    print(f"{gpu.name}\n{cost_model.stale_counts() or ''}")
    for name, workload in STEPS.items():
        dtype = workload.dtype
        gemm = 2 * workload.nodes * workload.vocab_size * workload.joint_dim / gpu.gemm_flops(dtype)
        for kept in (0.1, 1.0):
            rows = bounds_of(count_step(workload, kept), gpu, dtype)
            print(
                f"\n{name}, {kept:.0%} of the nodes kept; GEMM alone {1e3 * gemm:.3g} ms: ", end=""
            )
            print(f"{rows[-1]['ms'] / (1e3 * gemm):.3g} GEMMs\n\n{markdown_table(rows)}")


if __name__ == "__main__":
    main()
