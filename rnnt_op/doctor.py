"""What this machine has to compile kernels for its CPU and its GPUs, and what it lacks.

``python -m rnnt_op.doctor`` prints it, and needs no package beyond torch and cuda-python.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from rnnt_op.backends import gemm, sources
from rnnt_op.backends.kernels import USUAL
from rnnt_op.jit import (
    CompileError,
    DriverError,
    JitError,
    driver,
    environment,
    load_host_module,
    load_module,
)
from rnnt_op.jit.build import current_cache
from rnnt_op.jit.cpu import multiplies_bfloat16
from rnnt_op.jit.cuda_compiler import architecture_of, compiler_path, compiler_version
from rnnt_op.jit.host_compiler import HostCompiler
from rnnt_op.tools.cli.encoding import print_anything


@dataclass(frozen=True)
class Problem:
    """What is wrong and what to do about it, in a sentence."""

    text: str
    blocks_gpu: bool


@dataclass
class Diagnosis:
    """Facts by name, what computes the loss on each device, problems, and the verdict."""

    facts: dict[str, str] = field(default_factory=dict)
    uses: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    verdict: str = ""

    @property
    def status(self) -> int:
        """1 if a GPU is there that kernels cannot run on."""
        return int(any(problem.blocks_gpu for problem in self.problems))

    def report(self) -> str:
        """All of it as plain text."""
        width = max(map(len, [*self.facts, *self.uses]))
        parts = [
            "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())
            for lines in (self.facts, self.uses)
        ]
        return "\n\n".join(
            [*parts, "\n".join([self.verdict, *(f"- {found.text}" for found in self.problems)])]
        )

    def as_json(self) -> dict[str, Any]:
        """All of it as ``json`` takes it."""
        return {"status": self.status, **dataclasses.asdict(self)}


def diagnose(*, all_variables: bool = False) -> Diagnosis:
    """Collects versions, devices and the cache; loads kernels here and on every GPU there is.

    Args:
        all_variables: also explain environment variables that are not set.
    """
    found = Diagnosis()
    _add_versions(found)
    _add_host(found)
    devices = _add_driver(found)
    if devices and _torch_sees_devices(found):
        for index in range(torch.cuda.device_count()):
            _add_device(found, index)
    _add_cache(found)
    _add_environment(found, all_variables)
    found.problems.sort(key=lambda problem: not problem.blocks_gpu)
    if found.status:
        found.verdict = "there is a GPU, but kernels cannot run on it:"
    elif devices:
        found.verdict = "kernels compile and load on every device"
    else:
        found.verdict = "no GPU; the CPU backend needs none"
    return found


def _add_versions(found: Diagnosis) -> None:
    found.facts |= {
        "rnnt_op": _installed("rnnt-op"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda or "none, a CPU build",
        "cuda-python": _installed("cuda-python"),
    }
    try:
        major, minor = compiler_version()
        found.facts["NVRTC"] = f"{major}.{minor} at {compiler_path()}"
    except JitError as error:
        found.facts["NVRTC"] = str(error)


def _add_host(found: Diagnosis) -> None:
    try:
        compiler = HostCompiler.from_environment()
        found.facts["C++ compiler"] = f"{compiler.version()} at {compiler.path}"
    except JitError as error:
        found.facts["C++ compiler"] = str(error)
    try:
        for source in sources.CPU.needed(USUAL):
            load_host_module(source)
    except JitError as error:
        # No obstacle: torch has operations that do the same.
        reason = str(error).partition("\n")[0]  # without the compiler's log
        if isinstance(error, CompileError):
            reason += "; name another compiler in CXX, or other flags in CXXFLAGS"
        found.facts["CPU kernels"] = "do not run here"
        found.uses["cpu"] = "torch operations, slower than kernels; GEMMs by torch.mm"
        found.problems.append(Problem(f"the CPU has no kernels: {reason}", blocks_gpu=False))
        return
    found.facts["CPU kernels"] = "compile and load"
    gemms = ["GEMMs by torch.mm"]
    if gemm.onednn_serves(torch.empty(1, 1)):
        gemms.append("in float32 by oneDNN where that is faster")
    if multiplies_bfloat16() and gemm.mkl_serves(torch.bfloat16):
        gemms.append("in bfloat16 by MKL with float32 results")
    kernels = f"C++ kernels for {torch.backends.cpu.get_cpu_capability()}"
    found.uses["cpu"] = f"{kernels}; {', '.join(gemms)}"


def _add_driver(found: Diagnosis) -> int:
    """Returns the number of GPUs."""
    try:
        devices = driver.device_count()
        major, minor = driver.version()
    except DriverError as error:
        if error.code in (None, "CUDA_ERROR_NO_DEVICE"):
            found.facts["driver"] = "no driver" if error.code is None else "no device"
        else:
            found.facts["driver"] = str(error)
            found.problems.append(Problem(str(error), blocks_gpu=True))
        return 0
    found.facts["driver"] = f"supports CUDA {major}.{minor}, {devices} device(s)"
    return devices


def _torch_sees_devices(found: Diagnosis) -> bool:
    if torch.version.cuda is None:
        problem = (
            f"torch {torch.__version__} is a CPU build: install a CUDA build, see "
            "https://pytorch.org/get-started/locally"
        )
    elif not torch.cuda.is_available():
        problem = (
            f"torch finds no device: update the driver, or install a torch built for the CUDA "
            f"version that it supports (this one is built for {torch.version.cuda})"
        )
    else:
        return True
    found.problems.append(Problem(problem, blocks_gpu=True))
    return False


def _add_device(found: Diagnosis, index: int) -> None:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    name = f"cuda:{index}"
    found.facts[name] = f"{properties.name}, compute capability {capability[0]}.{capability[1]}"
    try:
        architecture = architecture_of(capability)
        for source in sources.CUDA.needed(USUAL):
            load_module(source, torch.device("cuda", index))
    except JitError as error:
        found.uses[name] = "nothing"
        found.problems.append(Problem(f"{name}: {error}", blocks_gpu=True))
    else:
        found.uses[name] = (
            f"CUDA kernels for {architecture}; GEMMs by torch.mm (cuBLAS), of half operands with "
            "float32 results"
        )


def _add_cache(found: Diagnosis) -> None:
    state = current_cache().state()
    name = "" if state.directory is None else f"{state.directory} "
    if state.problem is not None:
        use = "not used"
        found.problems.append(Problem(f"the cache {name}{state.problem}", blocks_gpu=False))
    else:
        use = "writable" if state.writable else "read-only"
    found.facts["cache"] = f"{name}({use})"
    found.facts["cache entries"] = f"{state.entries}, {state.size} bytes"


def _add_environment(found: Diagnosis, all_variables: bool) -> None:
    for variable in environment.VARIABLES:
        if all_variables or variable.value is not None:
            explained = f"({variable.meaning}; default: {variable.default})"
            found.facts[variable.name] = f"{variable.value or 'unset'} {explained}"


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print_anything()
    diagnosis = diagnose()
    print(diagnosis.report())
    sys.exit(diagnosis.status)
