"""Every uninitialised tensor is filled with NaN, so that output nobody wrote screams; and tests
marked ``every_backend`` run on the CPU's two backends, on the emulated CUDA backend, and on a GPU
if there is one, except those that the mark names. Other tests run on the native backend.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tested_backends import CUDA, EAGER, EMULATOR, NATIVE, serve_cpu

# What cuBLAS asks for where algorithms must be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_configure(config: pytest.Config) -> None:
    # Threads of parallel workers would wait for each other's cores.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files stay together, with what they import, load and start; a worker that ends takes others'."""
    if config.getvalue("dist") != "load":  # which -n alone means
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("every_backend")
    if marker is not None:
        backends = [b for b in (NATIVE, EAGER, EMULATOR, CUDA) if b.id not in marker.args]
        metafunc.parametrize("backend", backends, indirect=True)


@pytest.fixture(autouse=True)
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str | None]:
    """What computes the loss of tensors made on the default device, None: nobody was named."""
    # Autouse, so that tests need not ask for it: pytest drops a fixture that none asks for.
    name = getattr(request, "param", None)
    if name == "cuda":
        with torch.device("cuda"):
            yield name
    else:
        if name is not None:
            serve_cpu(monkeypatch, name)
        yield name


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    # On a GPU, some operations of the references have no deterministic algorithm.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
