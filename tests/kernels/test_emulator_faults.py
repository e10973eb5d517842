"""The CUDA emulator itself: how wrong kernels are told."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulator import EmulatorError, guarded
from emulator_support import Compile, message
from expecttest import assert_expected_inline
from places import TESTS

from rnnt_op.jit import Argument


def test_launch_limits(compiled: Compile) -> None:
    text = """
        #define WARPS 4
        constexpr int lanes = 32;
        extern "C" __global__ void
        __launch_bounds__(lanes * (WARPS), 2) bounded(int* x) { *x = 1; }
        extern "C" __global__ void unbounded(int* x) { x[1] = dynamic_shared<int>()[0]; }
    """
    module = compiled(text)
    x = torch.zeros(2, dtype=torch.int32)
    module.launch("bounded", (1, 1, 1), (128, 1, 1), [x])
    module.launch("unbounded", (2**16, 1, 1), (1, 1, 1), [x], shared_bytes=48 * 1024)
    assert x.tolist() == [1, -1]
    errors = [
        message(module, "bounded", [x], (129, 1, 1)),
        message(module, "unbounded", [x], (32, 33, 1)),
        message(module, "unbounded", [x], (2, 2, 65)),
        message(module, "unbounded", [x], (1, 0, 1)),
        message(module, "unbounded", [x], grid=(2**31, 1, 1)),
        message(module, "unbounded", [x], grid=(1, 65536, 1)),
        message(module, "unbounded", [x], grid=(1, 1, 65536)),
        message(module, "unbounded", [x], grid=(1, -1, 1)),
        message(module, "unbounded", [x], shared_bytes=48 * 1024 + 1),
        message(module, "unknown", [x]),
    ]
    assert_expected_inline(
        "\n".join(errors),
        """\
bounded: block (129, 1, 1) has 129 threads, __launch_bounds__ allows 128
unbounded: block (32, 33, 1) has 1056 threads, a GPU allows 1024
unbounded: block (2, 2, 65) is not within (1024, 1024, 64)
unbounded: block (1, 0, 1) is not within (1024, 1024, 64)
unbounded: grid (2147483648, 1, 1) is not within (2147483647, 65535, 65535)
unbounded: grid (1, 65536, 1) is not within (2147483647, 65535, 65535)
unbounded: grid (1, 1, 65536) is not within (2147483647, 65535, 65535)
unbounded: grid (1, -1, 1) is not within (2147483647, 65535, 65535)
unbounded: 49153 bytes of dynamic shared memory, at most 49152 are allowed
no kernel 'unknown', there are bounded, unbounded""",
    )
    module = compiled(text, max_shared_bytes=2**20)
    module.launch("unbounded", (1, 1, 1), (1, 1, 1), [x], shared_bytes=227 * 1024)
    assert_expected_inline(
        message(module, "unbounded", [x], shared_bytes=227 * 1024 + 1),
        """unbounded: 232449 bytes of dynamic shared memory, at most 232448 are allowed""",
    )


def test_arguments(compiled: Compile) -> None:
    module = compiled("""
        struct Pair;
        extern "C" __global__ void kinds(const float* __restrict__ a, Pair* b, unsigned long long n,
                                         double c, double* out) {
          out[0] = a ? a[0] : -1, out[1] = b == nullptr, out[2] = double(n), out[3] = c;
        }
    """)
    one, out = torch.ones(1), torch.zeros(4, dtype=torch.float64)
    module.launch("kinds", (1, 1, 1), (1, 1, 1), [one, None, 2**40, 0.5, out])
    assert out.tolist() == [1, 1, 2**40, 0.5]
    module.launch("kinds", (1, 1, 1), (1, 1, 1), [None, one.data_ptr(), True, -0.5, out])
    assert out.tolist() == [-1, 0, 1, -0.5]
    errors = [
        message(module, "kinds", [one, None, 1, 0.5]),
        message(module, "kinds", [1.0, None, 1, 0.5, out]),
        message(module, "kinds", [one, None, 1.0, 0.5, out]),
        message(module, "kinds", [one, None, one, 0.5, out]),
        message(module, "kinds", [one, None, 1, 1, out]),
        message(module, "kinds", [one.to("meta"), None, 1, 0.5, out]),
    ]
    assert_expected_inline(
        "\n".join(errors),
        """\
kinds: expected 5 arguments, got 4
kinds: parameter 0 is a pointer, got float
kinds: parameter 2 is an integer, got float
kinds: parameter 2 is an integer, got Tensor
kinds: parameter 3 is a double, got int
kinds: argument 0 is a tensor on meta, not cpu""",
    )


@pytest.mark.parametrize("parameter", ["int", "float", "uint4"])
def test_parameters_have_eight_bytes(compiled: Compile, parameter: str) -> None:
    with pytest.raises(EmulatorError, match="every kernel parameter must have 8 bytes"):
        compiled(f'extern "C" __global__ void kernel(long long, {parameter}) {{}}')


def test_collectives_that_do_not_fit(compiled: Compile) -> None:
    module = compiled("""
        #define LANE (threadIdx.x % 32)
        #define KERNEL(name, ...) extern "C" __global__ void name() { __VA_ARGS__ }
        KERNEL(half_shuffles, if (LANE < 16) __shfl_sync(~0u, 1, 0); else __syncthreads();)
        KERNEL(never_comes, if (LANE != 5) __syncwarp(); else __syncwarp(1u << 5 | 1u << 6);)
        KERNEL(had_exited, if (LANE == 5) return; __syncthreads(); __shfl_xor_sync(~0u, 1, 1);)
        KERNEL(exits_later, if (LANE != 31) __shfl_xor_sync(~0u, 1, 1);)
        KERNEL(does_not_exist, __shfl_down_sync(~0u, 1.0, 1);)
        KERNEL(shuffle_and_ballot, if (LANE < 9) __shfl_up_sync(~0u, 1, 1); else __ballot_sync(~0u, 1);)
        KERNEL(sizes, if (LANE < 9) __shfl_sync(~0u, 1, 1); else __shfl_sync(~0u, 1.0, 1);)
        KERNEL(lacks_itself, __any_sync(0xffff, 1);)
        KERNEL(width, __shfl_sync(~0u, 1, 1, 12);)
        KERNEL(barriers, if (threadIdx.x < 32) __syncthreads(); else __syncthreads_or(1);)
    """)
    errors = [
        message(module, kernel, block=(40 if kernel == "does_not_exist" else 64, 1, 1))
        for kernel in module.kernels
    ]
    assert len(errors) == 10
    assert_expected_inline(
        "\n".join(errors),
        """\
deadlock in block (0,0,0) of kernel 'half_shuffles':
  16 of 64 live threads wait at __shfl_sync at test.cu:3, the first is (0,0,0) of warp 0 with mask 0xffffffff, of which 0xffff0000 do not come;
  32 of 64 live threads wait at __syncthreads at test.cu:3, the first is (16,0,0);
  16 of 64 live threads wait at __shfl_sync at test.cu:3, the first is (32,0,0) of warp 1 with mask 0xffffffff, of which 0xffff0000 do not come
deadlock in block (0,0,0) of kernel 'never_comes':
  31 of 64 live threads wait at __syncwarp at test.cu:4, the first is (0,0,0) of warp 0 with mask 0xffffffff, of which 0x00000020 do not come;
  1 of 64 live threads wait at __syncwarp at test.cu:4, the first is (5,0,0) of warp 0 with mask 0x00000060, of which 0x00000040 do not come;
  31 of 64 live threads wait at __syncwarp at test.cu:4, the first is (32,0,0) of warp 1 with mask 0xffffffff, of which 0x00000020 do not come;
  1 of 64 live threads wait at __syncwarp at test.cu:4, the first is (37,0,0) of warp 1 with mask 0x00000060, of which 0x00000040 do not come
__shfl_xor_sync with mask 0xffffffff, of which lanes 0x00000020 have exited or do not exist, at test.cu:5 by thread (0,0,0) of block (0,0,0) of kernel 'had_exited'
exit while lane 0 of the warp waits at __shfl_xor_sync with mask 0xffffffff for it, at test.cu:6 by thread (31,0,0) of block (0,0,0) of kernel 'exits_later'
__shfl_down_sync with mask 0xffffffff, of which lanes 0xffffff00 have exited or do not exist, at test.cu:7 by thread (32,0,0) of block (0,0,0) of kernel 'does_not_exist'
lanes of one collective (warp 0, mask 0xffffffff) call different operations: lane 0 __shfl_up_sync of 4 bytes, lane 31 __ballot_sync of 4 bytes, at test.cu:8 by thread (31,0,0) of block (0,0,0) of kernel 'shuffle_and_ballot'
lanes of one collective (warp 0, mask 0xffffffff) call different operations: lane 0 __shfl_sync of 4 bytes, lane 31 __shfl_sync of 8 bytes, at test.cu:9 by thread (31,0,0) of block (0,0,0) of kernel 'sizes'
__any_sync with mask 0x0000ffff, which lacks the calling lane 16, at test.cu:10 by thread (16,0,0) of block (0,0,0) of kernel 'lacks_itself'
__shfl_sync with width 12, which is no power of two up to 32, at test.cu:11 by thread (0,0,0) of block (0,0,0) of kernel 'width'
__syncthreads_or while other threads wait at __syncthreads at test.cu:12 by thread (32,0,0) of block (0,0,0) of kernel 'barriers'""",
    )


MEMORY = """
    extern "C" __global__ void write(float* x, long long i) {
      if (threadIdx.x == 3 && blockIdx.y == 1) x[i] = 1.0f;
    }
    extern "C" __global__ void read(const float* x, long long i, float* out) {
      if (threadIdx.x == 3 && blockIdx.y == 1) *out = x[i];
    }
"""


@pytest.mark.parametrize(
    ("side", "inside", "outside"), [("end", (0, 7), (8, 100)), ("start", (0, 7), (-1, -100))]
)
def test_out_of_bounds(
    compiled: Compile, side: str, inside: tuple[int, ...], outside: tuple[int, ...]
) -> None:
    module = compiled(MEMORY)
    x, out = guarded(torch.arange(8.0) + 10, side), torch.zeros(1)
    grid, block = (1, 2, 1), (8, 1, 1)
    for i in inside:
        module.launch("read", grid, block, [x, i, out])
        assert out.item() == 10 + i
        module.launch("write", grid, block, [x, i])
        assert x[i] == 1
    where = "by thread (3,0,0) of block (0,1,0) of kernel"
    for i in outside:
        read = f"out-of-bounds read at <address> at test.cu:5 {where} 'read'"
        assert message(module, "read", [x, i, out], block, grid) == read
        write = f"out-of-bounds write at <address> at test.cu:2 {where} 'write'"
        assert message(module, "write", [x, i], block, grid) == write
    module.launch("read", grid, block, [x, inside[0], out])  # a fault leaves nothing behind


def test_other_faults(compiled: Compile) -> None:
    text = """
        extern "C" __global__ void vector(const float* x, long long i, float* out) {
          const float4 v = *reinterpret_cast<const float4*>(x + i);
          *out = v.x + v.w;
        }
        extern "C" __global__ void stream(const float* x, long long i, float* out) {
          *out = __uint_as_float(load_streaming(reinterpret_cast<const uint4*>(x + i)).w);
        }
        extern "C" __global__ void null(int* x) { *x = 1; }
        extern "C" __global__ void beyond_shared(long long i, int* out) {
          *out = dynamic_shared<int>()[i];
        }
        extern "C" __global__ void beyond_array(long long i, int* out) {
          __shared__ int array[4];
          array[i] = 1;
          *out = array[0];
        }
        __device__ __noinline__ int deep(long long n) {
          volatile char frame[256];
          frame[n % 256] = 1;
          return n == 0 ? 0 : deep(n - 1) + frame[n % 256];
        }
        extern "C" __global__ void recursion(long long n, int* out) { *out = deep(n); }
        extern "C" __global__ void division(long long n, long long* out) { *out = 7 / n; }
        extern "C" __global__ void cast(double x, int* out) { *out = static_cast<int>(x); }
        extern "C" __global__ void overflow(long long x, long long* out) { *out = x + 1; }
        extern "C" __global__ void assertion(long long x) { assert(x == 0 && "zero"); }
        extern "C" __global__ void trap(long long x) {
          if (x) __trap();
        }
    """
    module = compiled(text)
    x, out = guarded(torch.arange(8.0)), torch.zeros(1)
    integer, long = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    right_and_wrong: dict[str, tuple[list[Argument], list[Argument]]] = {
        "vector": ([x, 4, out], [x, 1, out]),
        "stream": ([x, 4, out], [x, 2, out]),
        "null": ([integer], [None]),
        "beyond_shared": ([3, integer], [4, integer]),
        "beyond_array": ([3, integer], [4, integer]),
        "recursion": ([10, integer], [1000, integer]),
        "division": ([1, long], [0, long]),
        "cast": ([1e9, integer], [1e10, integer]),
        "overflow": ([1, long], [2**63 - 1, long]),
        "assertion": ([0], [1]),
        "trap": ([0], [1]),
    }
    assert list(right_and_wrong) == list(module.kernels)
    errors = []
    for kernel, (right, wrong) in right_and_wrong.items():
        module.launch(kernel, (1, 1, 1), (1, 1, 1), right, shared_bytes=16)
        errors.append(message(module, kernel, wrong, (1, 1, 1), shared_bytes=16))
    # Which of the function's writes meets the guard page first depends on where the stack begins.
    text_of_errors = re.sub(r"(overflow\) at test.cu):\d+", r"\1", "\n".join(errors))
    assert_expected_inline(
        text_of_errors,
        """\
misaligned access to 'const struct float4' (16 bytes) at <address> at test.cu:2 by thread (0,0,0) of block (0,0,0) of kernel 'vector'
misaligned access to 'const struct uint4' (16 bytes) at <address> at test.cu:6 by thread (0,0,0) of block (0,0,0) of kernel 'stream'
out-of-bounds write at <address> (null pointer) at test.cu:8 by thread (0,0,0) of block (0,0,0) of kernel 'null'
out-of-bounds read at <address> (dynamic shared memory) at test.cu:10 by thread (0,0,0) of block (0,0,0) of kernel 'beyond_shared'
index 4 out of bounds of 'int [4]' at test.cu:14 by thread (0,0,0) of block (0,0,0) of kernel 'beyond_array'
out-of-bounds write at <address> (stack overflow) at test.cu by thread (0,0,0) of block (0,0,0) of kernel 'recursion'
division by zero or overflow of a division at test.cu:23 by thread (0,0,0) of block (0,0,0) of kernel 'division'
floating-point value that its integer type cannot hold at test.cu:24 by thread (0,0,0) of block (0,0,0) of kernel 'cast'
signed integer overflow at test.cu:25 by thread (0,0,0) of block (0,0,0) of kernel 'overflow'
assertion `x == 0 && "zero"' failed at test.cu:26 by thread (0,0,0) of block (0,0,0) of kernel 'assertion'
__trap() at test.cu:28 by thread (0,0,0) of block (0,0,0) of kernel 'trap'""",
    )

    unchecked = compiled(text, checked=False)
    unchecked.launch("overflow", (1, 1, 1), (1, 1, 1), [2**63 - 1, long])
    assert long.item() == -(2**63)
    # The processor's own trap.
    assert message(unchecked, "division", [0, long]).startswith("division by zero at test.cu:23 ")


def test_a_fault_outside_of_a_launch_is_not_ours(tmp_path: Path) -> None:
    """After launches, and while another thread runs one: Python's own handler ends the process."""
    (tmp_path / "test.cu").write_text("""
        extern "C" __global__ void set(int* x) { *x = 1; }
        extern "C" __global__ void spin(volatile int* started) {
          for (;;) *started = 1;
        }
    """)
    script = f"""
import ctypes, faulthandler, pathlib, sys, threading
sys.path.insert(0, {str(TESTS)!r})
import torch
from emulator import EmulatedModule
from emulator_support import message, signal_handlers
from rnnt_op.jit import KernelSource
faulthandler.enable()
module = EmulatedModule(KernelSource("test", (), pathlib.Path({str(tmp_path)!r})))
started = torch.zeros(1, dtype=torch.int32)
before = signal_handlers()
module.launch("set", (1, 1, 1), (1, 1, 1), [started])
assert "null pointer" in message(module, "set", [None])
assert signal_handlers() == before
arguments = "spin", (1, 1, 1), (1, 1, 1), [started.zero_()]
threading.Thread(target=module.launch, args=arguments, daemon=True).start()
while not started.item():
    pass
ctypes.string_at(8)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == -signal.SIGSEGV, result.stderr
    assert "Fatal Python error: Segmentation fault" in result.stderr
    assert "string_at" in result.stderr
