"""One tool of compute-sanitizer over the kernels of this package, on one small problem.

The status is 0 if it found nothing, 1 if it found something, and 77 if the tool is not here or
cannot run: some virtual machines do not let it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

from command_line import parse
from on_device import OUR_KERNELS
from step_runner import SKIPPED

_RUN = """
import torch, rnnt_op
torch.manual_seed(0)
leaf = lambda *shape: torch.randn(shape, device="cuda").to(torch.bfloat16).requires_grad_()
leaves = leaf(3, 9, 20), leaf(3, 6, 20), leaf(13, 20), leaf(13)
targets = torch.randint(1, 13, (3, 5), device="cuda")
lengths = torch.tensor([9, 1, 4]), torch.tensor([5, 2, 0])
loss = rnnt_op.joint_rnnt_loss(*leaves, targets, *lengths, workspace_bytes=20_000)
torch.autograd.grad(loss, leaves)
torch.cuda.synchronize()
print("the run is done")
"""
_FINDING = re.compile(r"Invalid __|Race reported|hazard detected|Misaligned|Barrier error")
_REFUSAL = re.compile(
    r"^.*(?:not supported|unsupported|unable to|could not|not permitted|failed to init).*$",
    re.IGNORECASE | re.MULTILINE,
)
FOUND = 9  # the status that the tool is told to have where it found something


@dataclass(frozen=True)
class Config:
    """What a sanitizer finds."""

    tool: str = "memcheck"
    sanitizer: str = "compute-sanitizer"


def verdict(status: int, output: str) -> tuple[int, str]:
    """Our status, and why, from what the tool left."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    said = summaries[-1].strip() if summaries else ""
    if status == 0 and summaries and "the run is done" in output:
        return 0, said
    if _FINDING.search(output):
        return 1, said
    refusal = _REFUSAL.search(output)
    if refusal is not None:
        return SKIPPED, f"it cannot run here: {refusal[0].strip('= ')}"
    if not summaries:
        last = [line for line in output.splitlines() if line.strip()][-1:]
        return SKIPPED, f"it ended without a summary: {''.join(last)}"
    return 1, f"the run did not end well; {said}"


def main(config: Config) -> int:
    program = shutil.which(config.sanitizer)
    if program is None:
        print(f"no {config.sanitizer} here")
        return SKIPPED
    # Only kernels of this package: torch's own are not ours to judge.
    kernels = [
        option for name in OUR_KERNELS for option in ("--kernel-name", f"kernel_substring={name}")
    ]
    command = [program, "--tool", config.tool, "--error-exitcode", str(FOUND), *kernels]
    process = subprocess.run(
        [*command, sys.executable, "-c", _RUN],
        # Without torch's caching allocator every tensor has bounds of its own.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(process.stdout)
    status, why = verdict(process.returncode, process.stdout)
    print(why)
    return status


if __name__ == "__main__":
    sys.exit(main(parse(Config, __doc__)))
