"""What this machine has to compile kernels for its CPU and its GPUs, and what it lacks."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass, field

import torch

from rnnt_op.backends import cuda_sources, native_sources
from rnnt_op.jit import (
    DriverError,
    JitError,
    driver,
    environment,
    load_host_module,
    load_module,
)
from rnnt_op.jit.build import current_cache
from rnnt_op.jit.cuda_compiler import architecture_of, compiler_path, compiler_version
from rnnt_op.jit.host_compiler import HostCompiler


@dataclass
class Diagnosis:
    """Facts by name, what keeps kernels from running on a GPU that is there, and the verdict."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    verdict: str = ""


def diagnose() -> Diagnosis:
    """Collects versions, devices and the cache; loads kernels here and on every GPU there is."""
    found = Diagnosis()
    _add_versions(found)
    _add_host(found)
    devices = _add_driver(found)
    if devices and _torch_sees_devices(found):
        for index in range(torch.cuda.device_count()):
            _add_device(found, index)
    _add_cache(found)
    if found.obstacles:
        found.verdict = "there is a GPU, but kernels cannot run on it:"
    elif devices:
        found.verdict = "kernels compile and load on every device"
    else:
        found.verdict = "no GPU; the CPU backend needs none"
    return found


def _add_versions(found: Diagnosis) -> None:
    found.facts += [
        ("rnnt_op", _installed("rnnt-op")),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("torch's CUDA", torch.version.cuda or "none, a CPU build"),
        ("cuda-python", _installed("cuda-python")),
    ]
    try:
        major, minor = compiler_version()
        found.facts.append(("NVRTC", f"{major}.{minor} at {compiler_path()}"))
    except JitError as error:
        found.facts.append(("NVRTC", str(error)))


def _add_host(found: Diagnosis) -> None:
    """A missing compiler is no obstacle: the CPU backend has torch operations that do the same."""
    try:
        compiler = HostCompiler.from_environment()
        found.facts.append(("C++ compiler", f"{compiler.version()} at {compiler.path}"))
    except JitError as error:
        found.facts.append(("C++ compiler", str(error)))
    try:
        for source in native_sources.kernel_sources(torch.float32, "tanh"):
            load_host_module(source)
        kernels = "compile and load"
    except JitError as error:
        reason = str(error).partition("\n")[0]  # without the compiler's log
        kernels = f"torch operations serve instead, slower: {reason}"
    found.facts.append(("CPU kernels", kernels))


def _add_driver(found: Diagnosis) -> int:
    """Returns the number of GPUs."""
    try:
        devices = driver.device_count()
        major, minor = driver.version()
    except DriverError as error:
        if error.code in (None, "CUDA_ERROR_NO_DEVICE"):
            found.facts.append(("driver", "no driver" if error.code is None else "no device"))
        else:
            found.facts.append(("driver", str(error)))
            found.obstacles.append(str(error))
        return 0
    found.facts.append(("driver", f"supports CUDA {major}.{minor}, {devices} device(s)"))
    return devices


def _torch_sees_devices(found: Diagnosis) -> bool:
    if torch.version.cuda is None:
        found.obstacles.append(
            f"torch {torch.__version__} is a CPU build: install a CUDA build, see "
            "https://pytorch.org/get-started/locally"
        )
    elif not torch.cuda.is_available():
        found.obstacles.append(
            f"torch finds no device: update the driver, or install a torch built for the CUDA "
            f"version that it supports (this one is built for {torch.version.cuda})"
        )
    else:
        return True
    return False


def _add_device(found: Diagnosis, index: int) -> None:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    label = f"{properties.name}, compute capability {capability[0]}.{capability[1]}"
    try:
        label += f", {architecture_of(capability)}"
        for source in cuda_sources.kernel_sources(torch.float32, "tanh"):
            load_module(source, torch.device("cuda", index))
    except JitError as error:
        found.obstacles.append(f"cuda:{index}: {error}")
    found.facts.append((f"cuda:{index}", label))


def _add_cache(found: Diagnosis) -> None:
    state = current_cache().state()
    if state.problem is not None:
        use = f"not used: it {state.problem}"
    else:
        use = "writable" if state.writable else "read-only"
    found.facts += [
        ("cache", f"{state.directory} ({use})"),
        ("cache entries", f"{state.entries}, {state.size} bytes"),
    ]
    for variable in environment.VARIABLES:
        value = "unset" if variable.value is None else variable.value
        text = f"{value} ({variable.meaning}; default: {variable.default})"
        found.facts.append((variable.name, text))


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
