"""Loading and launching, up to the driver's calls."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jit_support
import pytest
import torch
from expecttest import assert_expected_inline
from jit_support import FakeDriver, in_threads, write_kernel

from rnnt_op.jit import (
    ArgumentError,
    CaptureError,
    CudaModule,
    DriverError,
    JitError,
    KernelSource,
    build,
    cuda_module,
    driver,
    launching,
    load_module,
)
from rnnt_op.jit.compiler import Compiler
from rnnt_op.jit.concurrency import Once
from rnnt_op.jit.cuda_compiler import CudaCompiler

nvrtc = jit_support.nvrtc
cache_dir = jit_support.cache_dir

STREAM = 0xABC
DEVICE = torch.device("cuda", 1)
CONTEXT = 0x1001  # the fake driver's primary context of that device


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return install(FakeDriver(), monkeypatch)


def install(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    monkeypatch.setattr(driver, "_api", fake)
    monkeypatch.setattr(driver, "_primary_contexts", {})
    monkeypatch.setattr(cuda_module, "_modules", Once())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=STREAM + index)
    )
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 1)
    return fake


SOURCE = """
extern "C" __global__ void scale(double* values, long long count, float* other) {}
extern "C" __global__ void another(double* values, long long count, float* other) {}
"""
ARGUMENTS = [None, 2, None]


def made(folder: Path) -> CudaModule:
    (folder / "scale.cu").write_text(SOURCE)
    return CudaModule(object(), 1, KernelSource("scale", root=folder))


@pytest.fixture
def scale(fake: FakeDriver, tmp_path: Path) -> CudaModule:
    return made(tmp_path)


def message(function: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(JitError) as error:
        function(*arguments)
    return f"{type(error.value).__name__}: {error.value}"


def test_launch(scale: CudaModule, fake: FakeDriver) -> None:
    tensor = torch.zeros(3, dtype=torch.float64)
    scale.launch("scale", (4, 3, 2), (32, 1, 1), [tensor, -5, None], shared_bytes=100)
    assert fake.named("launch") == [
        ("launch", "scale", (4, 3, 2, 32, 1, 1), 100, STREAM + 1, CONTEXT)
    ]
    assert fake.launched == [tensor.data_ptr(), -5, 0]


def test_empty_grid_launches_nothing(scale: CudaModule, fake: FakeDriver) -> None:
    for grid in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        scale.launch("scale", grid, (32, 1, 1), ARGUMENTS)
    assert not fake.calls


def test_shared_memory_above_48_kib_is_asked_for_once(scale: CudaModule, fake: FakeDriver) -> None:
    def launch(kernel: str, shared_bytes: int) -> int:
        scale.launch(kernel, (1, 1, 1), (32, 1, 1), ARGUMENTS, shared_bytes)
        return len(fake.named("set_attribute"))

    limit = 48 * 1024
    assert launch("scale", limit) == 0
    assert launch("scale", limit + 1) == 1
    assert launch("scale", limit + 1) == 1
    assert launch("scale", 100) == 1
    assert launch("scale", 2 * limit) == 2
    assert launch("scale", limit + 1) == 2
    assert launch("another", limit + 1) == 3
    attribute = fake.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert fake.named("set_attribute")[1] == ("set_attribute", "scale", attribute, 2 * limit)
    assert [call[3] for call in fake.named("launch")][:2] == [limit, limit + 1]


def test_shared_memory_given_to_another_thread_is_not_taken_back(
    scale: CudaModule, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = scale.find("scale")

    class Waiting:
        """The other thread has the lock first, and asks for more."""

        def __enter__(self) -> None:
            entry.dynamic_bytes = 200_000

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(scale, "_lock", Waiting())
    scale.launch("scale", (1, 1, 1), (32, 1, 1), ARGUMENTS, 100_000)
    assert entry.dynamic_bytes == 200_000
    assert not fake.named("set_attribute")


def test_static_shared_memory_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = install(FakeDriver(static_bytes=1024), monkeypatch)
    scale = made(tmp_path)
    scale.launch("scale", (1, 1, 1), (32, 1, 1), ARGUMENTS, 47 * 1024)
    assert not fake.named("set_attribute")
    scale.launch("scale", (1, 1, 1), (32, 1, 1), ARGUMENTS, 47 * 1024 + 1)
    assert fake.named("set_attribute")


@pytest.mark.parametrize("current", [0, 0x1000, CONTEXT])
def test_context_is_made_current_and_restored(
    current: int, scale: CudaModule, fake: FakeDriver
) -> None:
    fake.current = current
    for _ in range(2):
        scale.launch("scale", (1, 1, 1), (32, 1, 1), ARGUMENTS)
    assert [call[-1] for call in fake.named("launch")] == [CONTEXT] * 2
    assert fake.current == current
    assert len(fake.named("retain")) == 1
    assert len(fake.named("set_context")) == (0 if current == CONTEXT else 4)


def test_stream_and_context_are_looked_up_once(
    scale: CudaModule, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up = []

    def current_stream(index: int) -> SimpleNamespace:
        looked_up.append(index)
        return SimpleNamespace(cuda_stream=STREAM + len(looked_up))

    def launch(times: int = 1) -> None:
        for _ in range(times):
            scale.launch("scale", (1, 1, 1), (32, 1, 1), ARGUMENTS)

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    with launching(1):
        launch(2)
        with launching(0):  # another device's stream is none of this one's
            launch()
        launch()
        in_threads(1, launch)  # nor is another thread's
        fake.fails["launch"] = fake.CUresult.CUDA_ERROR_INVALID_VALUE
        with pytest.raises(DriverError), launching(1):
            launch()
        fake.fails.clear()
        launch()
    launch()
    assert looked_up == [1, 0, 1, 1, 1, 1]
    streams = [call[-2] - STREAM for call in fake.named("launch")]
    assert streams == [1, 1, 3, 1, 4, 5, 1, 6]
    assert all(call[-1] == CONTEXT for call in fake.named("launch"))
    assert fake.current == 0


def test_context_is_restored_after_an_error(scale: CudaModule, fake: FakeDriver) -> None:
    fake.fails["launch"] = fake.CUresult.CUDA_ERROR_INVALID_VALUE
    assert_expected_inline(
        message(scale.launch, "scale", (1, 1, 1), (32, 1, 1), ARGUMENTS),
        """DriverError: could not launch scale with grid (1, 1, 1), block (32, 1, 1), 0 B shared: CUDA_ERROR_INVALID_VALUE (the driver's words)""",
    )
    assert fake.current == 0


def test_wrong_arguments(
    scale: CudaModule, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*arguments: object) -> str:
        return message(scale.launch, "scale", (1, 1, 1), (32, 1, 1), arguments)

    assert_expected_inline(
        launch(None, 2),
        """ArgumentError: scale in scale.cu: expected 3 arguments (values, count, other), got 2""",
    )
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: -1)
    assert_expected_inline(
        launch(None, 2, torch.zeros(1)),
        """ArgumentError: scale in scale.cu: expected other as a tensor on cuda:1, got one on cpu""",
    )
    assert not fake.named("launch")


def test_unknown_kernel(scale: CudaModule, fake: FakeDriver) -> None:
    fake.fails["function"] = fake.CUresult.CUDA_ERROR_NOT_FOUND
    assert_expected_inline(
        message(scale.launch, "scala", (1, 1, 1), (32, 1, 1), []),
        """DriverError: could not find kernel scala: CUDA_ERROR_NOT_FOUND (the driver's words)""",
    )


@pytest.mark.usefixtures("nvrtc", "cache_dir")
def test_module_is_loaded_once_for_a_source_and_a_device(tmp_path: Path, fake: FakeDriver) -> None:
    source = write_kernel(tmp_path)
    loaded = load_module(source, DEVICE)
    assert load_module(KernelSource("scale", source.macros, tmp_path), DEVICE) is loaded
    assert load_module(source, torch.device("cuda")) is loaded
    assert len(fake.named("load")) == 1
    _, cubin, context = fake.named("load")[0]
    assert cubin.startswith(b"\x7fELF")
    assert context == CONTEXT
    assert fake.named("function") == [("function", b"scale")]  # before any launch
    assert load_module(source, torch.device("cuda", 0)) is not loaded
    assert load_module(write_kernel(tmp_path, "3.0"), DEVICE) is not loaded
    assert [call[2] for call in fake.named("load")] == [CONTEXT, 0x1000, CONTEXT]
    assert fake.current == 0


@pytest.mark.usefixtures("nvrtc", "cache_dir")
def test_threads_load_once(
    tmp_path: Path, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []
    really_build = build.build

    def count(source: KernelSource, compiler: Compiler) -> build.Build:
        builds.append(threading.get_ident())
        return really_build(source, compiler)

    monkeypatch.setattr(cuda_module, "build", count)
    source = write_kernel(tmp_path)
    modules = in_threads(8, lambda: load_module(source, DEVICE))
    assert len(set(map(id, modules))) == len(builds) == len(fake.named("load")) == 1


@pytest.mark.usefixtures("nvrtc", "cache_dir")
def test_failed_load_is_tried_again(tmp_path: Path, fake: FakeDriver) -> None:
    source = write_kernel(tmp_path)
    fake.fails["load"] = fake.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DriverError):
        load_module(source, DEVICE)
    fake.fails.clear()
    assert isinstance(load_module(source, DEVICE), CudaModule)


@pytest.mark.usefixtures("nvrtc", "cache_dir")
def test_old_driver_is_named(
    tmp_path: Path, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaCompiler, "identity", lambda self: "NVRTC 13.4")
    fake.fails["load"] = fake.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
    assert_expected_inline(
        message(load_module, write_kernel(tmp_path), DEVICE),
        """DriverError: could not load scale.cu for sm_80 on cuda:1 (compiled by NVRTC 13.4; the driver supports CUDA 13.1): CUDA_ERROR_NO_BINARY_FOR_GPU (the driver's words); the kernel was compiled for another architecture, or the NVIDIA driver is older than the CUDA version that compiled the kernel: update the driver, or install the cuda-python and NVRTC of the CUDA version that the driver supports""",
    )


@pytest.mark.usefixtures("nvrtc", "cache_dir")
def test_capture_needs_loaded_modules(
    tmp_path: Path, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_kernel(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CaptureError) as error:
        load_module(source, DEVICE)
    assert_expected_inline(
        str(error.value),
        """scale.cu is not loaded on cuda:1 yet, and cannot be while a CUDA graph is captured: run the same computation once before the capture""",
    )
    assert not fake.calls
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    loaded = load_module(source, DEVICE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    calls = len(fake.calls)
    assert load_module(source, DEVICE) is loaded
    assert len(fake.calls) == calls


def test_other_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="expected a CUDA device, got cpu"):
        load_module(write_kernel(tmp_path), torch.device("cpu"))
