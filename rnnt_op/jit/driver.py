"""The few calls of the CUDA driver that loading and launching take, with errors in words."""

from __future__ import annotations

import os
from typing import Any

from rnnt_op.jit.errors import DriverError

_TOO_OLD = (
    "the NVIDIA driver is older than the CUDA version that compiled the kernel: update the driver, "
    "or install the cuda-python and NVRTC of the CUDA version that the driver supports"
)
_ADVICE = {
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the kernel was compiled for another architecture, or "
    + _TOO_OLD,
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": _TOO_OLD,
    "CUDA_ERROR_INVALID_IMAGE": _TOO_OLD,
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver was updated under a running kernel module: "
    "restart the machine",
    "CUDA_ERROR_NOT_INITIALIZED": "CUDA does not survive a fork: start worker processes by spawn",
    "CUDA_ERROR_NO_DEVICE": "no GPU is visible to this process; see CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "an earlier kernel of any library may be its cause; "
    "CUDA_LAUNCH_BLOCKING=1 shows which",
}

_api: Any = None
_primary_contexts: dict[int, Any] = {}


def _forget() -> None:
    """Drops what a forked child inherited: none of it is valid there."""
    global _api
    _api = None
    _primary_contexts.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def api() -> Any:
    """``cuda.bindings.driver``, initialised.

    Raises:
        DriverError: there is no driver, or it does not initialise.
    """
    global _api
    if _api is None:
        try:
            from cuda.bindings import driver

            result = driver.cuInit(0)
        except ImportError as error:
            raise DriverError("cuda-python is not installed: pip install cuda-python") from error
        except RuntimeError as error:
            raise DriverError(
                "no NVIDIA driver on this machine: libcuda could not be loaded"
            ) from error
        _check(driver, result, "initialise the driver")
        _api = driver
    return _api


def check(result: tuple[Any, ...], action: str) -> Any:
    """The values of a driver call: None, one, or a tuple.

    Raises:
        DriverError: the call failed; names ``action``, the driver's error and, if known, a remedy.
    """
    return _check(api(), result, action)


def version() -> tuple[int, int]:
    """The newest CUDA version that the driver supports."""
    number = check(api().cuDriverGetVersion(), "read the driver's version")
    return number // 1000, number % 1000 // 10


def device_count() -> int:
    return int(check(api().cuDeviceGetCount(), "count the devices"))


class current_context:
    """Makes the device's primary context current in this thread, and restores what was current.

    The thread may have none, as autograd's threads, or another device's, which torch takes for its
    current device.
    """

    def __init__(self, device: int) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._previous = check(api().cuCtxGetCurrent(), "read the current context")
        context = _primary_context(self._device)
        self._is_other = int(self._previous) != int(context)
        if self._is_other:
            check(api().cuCtxSetCurrent(context), f"make cuda:{self._device} current")

    def __exit__(self, *error: object) -> None:
        if self._is_other:
            check(api().cuCtxSetCurrent(self._previous), "restore the current context")


def load(cubin: bytes, action: str) -> Any:
    """Loads a module into the current context."""
    return check(api().cuModuleLoadData(cubin), action)


def find_function(module: Any, kernel: str) -> Any:
    """An entry point of a module."""
    return check(api().cuModuleGetFunction(module, kernel.encode()), f"find kernel {kernel}")


def static_shared_bytes(function: Any) -> int:
    attribute = api().CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
    return int(check(api().cuFuncGetAttribute(attribute, function), "read a kernel's attributes"))


def allow_dynamic_shared_bytes(function: Any, size: int, kernel: str) -> None:
    attribute = api().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(
        api().cuFuncSetAttribute(function, attribute, size),
        f"give kernel {kernel} {size} bytes of dynamic shared memory",
    )


def launch(
    function: Any,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    stream: int,
    parameters: int,
    kernel: str,
) -> None:
    """Launches; ``stream`` is the handle, ``parameters`` the address of the void* array."""
    result = api().cuLaunchKernel(function, *grid, *block, shared_bytes, stream, parameters, 0)
    if result[0]:
        check(result, f"launch {kernel} with grid {grid}, block {block}, {shared_bytes} B shared")


def _primary_context(device: int) -> Any:
    context = _primary_contexts.get(device)
    if context is None:
        handle = check(api().cuDeviceGet(device), f"find cuda:{device}")
        retained = check(api().cuDevicePrimaryCtxRetain(handle), f"open cuda:{device}")
        # A second thread may have retained it too; a primary context is one object, never released.
        context = _primary_contexts.setdefault(device, retained)
    return context


def _check(driver: Any, result: tuple[Any, ...], action: str) -> Any:
    code, *values = result
    if code == driver.CUresult.CUDA_SUCCESS:
        return values[0] if len(values) == 1 else tuple(values) or None
    name, text = (
        (value or b"unknown").decode()
        for _, value in (driver.cuGetErrorName(code), driver.cuGetErrorString(code))
    )
    advice = f"; {_ADVICE[name]}" if name in _ADVICE else ""
    raise DriverError(f"could not {action}: {name} ({text}){advice}", name)
