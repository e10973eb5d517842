"""What the host takes for a launch, and how many calls a step has, without a GPU.

A driver that does nothing stands for CUDA's, so times are those of this package's own Python, as an
op launches: kernels and arguments looked up, checked and packed. Calls of a step are those of
``dry_run.py``.
"""

from __future__ import annotations

from timeit import repeat
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from dry_run import STEPS, count_step

from rnnt_op.backends.kernels import Kernels
from rnnt_op.backends.sources import CUDA
from rnnt_op.jit import Argument, driver, launching
from rnnt_op.jit.cuda_module import CudaModule
from rnnt_op.jit.signature import Signature, signatures
from rnnt_op.tools.study.report import describe_machine, markdown_table

CPU = -1
"""What tensors there say their GPU is, so that arguments need none."""


class Driver:
    """Answers what a launch asks."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES=0)

    def __getattr__(self, name: str) -> Any:
        value = {"cuLaunchKernel": (), "cuCtxSetCurrent": ()}.get(name, (0,))
        return lambda *arguments: (0, *value)


def arguments_of(signature: Signature) -> dict[str, Argument]:
    values: dict[str, Argument] = {"q": 3, "d": 0.5}
    return {
        p.name: torch.zeros(1, dtype=p.dtypes[0] if p.dtypes else torch.int64)
        if p.code == "Q"
        else values[p.code]
        for p in signature.parameters
    }


def main() -> None:
    torch.set_num_threads(1)
    kernels = Kernels(torch.bfloat16, input_dtype=torch.bfloat16, result="gradients")
    rows = []
    stream = SimpleNamespace(cuda_stream=0)
    with (
        patch.object(driver, "api", Driver),
        patch.object(torch.cuda, "current_stream", lambda _: stream),
        launching(CPU),
    ):
        for source in CUDA.needed(kernels):
            module = CudaModule(None, CPU, source)
            for name, signature in signatures(source).items():
                arguments = arguments_of(signature)
                rows.append(
                    {
                        "kernel": name,
                        "parameters": len(signature.parameters),
                        "µs a launch": microseconds(module, name, arguments),
                    }
                )
    print(f"{describe_machine()}\n\n{markdown_table(rows)}\n")
    steps = []
    for name, workload in STEPS.items():
        step = count_step(workload, kept=0.1)
        torch_calls = sum(n for call, n in step.calls.items() if call.startswith("torch:"))
        steps.append({"step": name, "host calls": step.host_calls, "torch kernels": torch_calls})
    print(markdown_table(steps))


def microseconds(module: CudaModule, kernel: str, arguments: dict[str, Argument]) -> float:
    """Least of some rounds: others are those in which the machine did something else."""

    def launch() -> None:
        module.launch(kernel, (1, 1, 1), (32, 1, 1), arguments)

    launches = 2000
    return min(repeat(launch, number=launches, repeat=15)) / launches * 1e6


if __name__ == "__main__":
    main()
