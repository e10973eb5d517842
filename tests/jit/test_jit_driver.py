"""The driver's calls through cuda-python itself, with a libcuda of our own that prints them."""

import ctypes.util
import shutil
import subprocess
from pathlib import Path

import jit_support
import pytest
import torch
from expecttest import assert_expected_inline
from jit_support import run_script

from rnnt_op.jit import DriverError, driver

nvrtc = jit_support.nvrtc

LIBCUDA = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
static void* current;
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)(uintptr_t)(0x1000 + device);
  return 0;
}
int cuCtxGetCurrent(void** context) { *context = current; return 0; }
int cuCtxSetCurrent(void* context) {
  printf("context %#lx\n", (unsigned long)context);
  current = context;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  printf("load %.3s\n", (const char*)image + 1);
  *module = (void*)0x77;
  return ((const char*)image)[0] == 0x7f ? 0 : 200;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  printf("function %s of %#lx\n", name, (unsigned long)module);
  *function = (void*)0x88;
  return name[0] == 's' ? 0 : 500;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  printf("attribute %d\n", attribute);
  *value = 1024;
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  printf("attribute %d of %#lx = %d\n", attribute, (unsigned long)function, value);
  return 0;
}
int cuGetErrorName(int code, const char** name) {
  *name = code == 200 ? "CUDA_ERROR_INVALID_IMAGE" : "CUDA_ERROR_NOT_FOUND";
  return 0;
}
int cuGetErrorString(int code, const char** text) { *text = "words"; return 0; }
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** parameters, void** extra) {
  printf("launch %#lx: %u %u %u, %u %u %u, %u, stream %#lx, extra %#lx:", (unsigned long)function,
         gx, gy, gz, bx, by, bz, shared, (unsigned long)stream, (unsigned long)extra);
  for (int i = 0; i < 2; ++i) printf(" %016llx", *(unsigned long long*)parameters[i]);
  printf("\n");
  return 0;
}
int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}
"""

LAUNCHES = """
import ctypes, os
from pathlib import Path
from types import SimpleNamespace
import torch
from jit_support import write_kernel
from rnnt_op.jit import DriverError, build, driver, load_module
from rnnt_op.jit.cuda_compiler import CudaCompiler

os.environ["RNNT_OP_CACHE_DIR"] = sys.argv[2] + "/cache"
build.build(write_kernel(Path(sys.argv[2])), CudaCompiler("sm_90a"))
# After the compilation: NVRTC uses a libcuda that is loaded, and needs more of it than is here.
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

torch.cuda.current_stream = lambda index: SimpleNamespace(cuda_stream=0xABC)
torch.cuda.get_device_capability = lambda index: (9, 0)
torch.cuda.is_current_stream_capturing = lambda: False
print(driver.version(), driver.device_count(), flush=True)
scale = load_module(write_kernel(Path(sys.argv[2])), torch.device("cuda", 1))
for _ in range(2):
    scale.launch("scale", (3, 2, 1), (32, 1, 1), [None, -1], 100_000)
for attempt in (
    lambda: scale.launch("other", (1, 1, 1), (1, 1, 1), []),
    lambda: driver.load(b"?bad image", "load it"),
):
    try:
        attempt()
    except DriverError as error:
        ctypes.CDLL(None).fflush(None)
        print(error.code, flush=True)
ctypes.CDLL(None).fflush(None)
"""


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to compile a libcuda with")
def test_calls_reach_libcuda_as_they_are_meant(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver")
    if torch.version.cuda is not None or ctypes.util.find_library("cuda") is not None:
        pytest.skip("a libcuda of our own and the real one would meet in one process")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-xc", "-", "-o", library, "-ldl"],
        input=LIBCUDA,
        text=True,
        check=True,
        capture_output=True,
    )
    assert_expected_inline(
        run_script(LAUNCHES, library, tmp_path),
        """\
(13, 1) 2
context 0x1001
load ELF
function scale of 0x77
attribute 1
context 0
context 0x1001
attribute 8 of 0x88 = 100000
launch 0x88: 3 2 1, 32 1 1, 100000, stream 0xabc, extra 0: 0000000000000000 ffffffffffffffff
context 0
context 0x1001
launch 0x88: 3 2 1, 32 1 1, 100000, stream 0xabc, extra 0: 0000000000000000 ffffffffffffffff
context 0
context 0x1001
function other of 0x77
context 0
CUDA_ERROR_NOT_FOUND
load bad
CUDA_ERROR_INVALID_IMAGE
""",
    )


def test_no_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = pytest.importorskip("cuda.bindings.driver")

    def not_found(flags: int) -> None:
        raise RuntimeError('"cuda" is an NVIDIA driver library')

    monkeypatch.setattr(bindings, "cuInit", not_found)
    monkeypatch.setattr(driver, "_api", None)
    with pytest.raises(DriverError) as error:
        driver.version()
    assert_expected_inline(
        str(error.value), """no NVIDIA driver on this machine: libcuda could not be loaded"""
    )
    assert error.value.code is None


def test_advice_names_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = pytest.importorskip("cuda.bindings.driver")
    code = bindings.CUresult.CUDA_ERROR_NOT_INITIALIZED
    success = bindings.CUresult.CUDA_SUCCESS
    monkeypatch.setattr(bindings, "cuInit", lambda flags: (code,))
    monkeypatch.setattr(bindings, "cuGetErrorName", lambda code: (success, code.name.encode()))
    monkeypatch.setattr(bindings, "cuGetErrorString", lambda code: (success, b"words"))
    monkeypatch.setattr(driver, "_api", None)
    with pytest.raises(DriverError) as error:
        driver.api()
    assert_expected_inline(
        str(error.value),
        """could not initialise the driver: CUDA_ERROR_NOT_INITIALIZED (words); CUDA does not survive a fork: start worker processes by spawn""",
    )
    assert error.value.code == "CUDA_ERROR_NOT_INITIALIZED"
