"""The CUDA emulator itself: what right kernels compute, and how wrong ones are told."""

from __future__ import annotations

import ctypes
import gc
import re
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from emulator import EmulatedModule, EmulatorError, build, guarded, thread_order
from emulator.build import build_kernels, find_kernels
from expecttest import assert_expected_inline
from places import TESTS
from torch import Tensor

from rnnt_op.jit import Argument, KernelSource

Compile = Callable[..., EmulatedModule]
ORDERS = pytest.mark.parametrize("order", ["ascending", "descending", "shuffled(3)"])


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    def compile_text(text: str, *macros: tuple[str, str], **options: int) -> EmulatedModule:
        (tmp_path / "test.cu").write_text(textwrap.dedent(text).lstrip())
        return EmulatedModule(KernelSource("test", macros, tmp_path), **options)

    return compile_text


def message(
    module: EmulatedModule,
    kernel: str,
    arguments: Sequence[Argument] = (),
    block: tuple[int, int, int] = (32, 1, 1),
    grid: tuple[int, int, int] = (1, 1, 1),
    shared_bytes: int = 0,
) -> str:
    """The error of a launch, without addresses."""
    with pytest.raises(EmulatorError) as error:
        module.launch(kernel, grid, block, arguments, shared_bytes)
    return re.sub(r" at 0x[0-9a-f]+", " at <address>", str(error.value))


# ---- what right kernels compute


@ORDERS
@pytest.mark.parametrize(
    ("grid", "block"),
    [((5, 1, 1), (33, 1, 1)), ((2, 3, 4), (3, 5, 2)), ((1, 1, 1), (16, 8, 8))],
    ids=str,
)
def test_indices(
    compiled: Compile, grid: tuple[int, int, int], block: tuple[int, int, int], order: str
) -> None:
    module = compiled("""
        extern "C" __global__ void indices(uint4* out) {
          const unsigned thread =
              threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
          const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
          uint4* const mine = out + 4 * (block * (blockDim.x * blockDim.y * blockDim.z) + thread);
          mine[0] = make_uint4(blockIdx.z, blockIdx.y, blockIdx.x, thread % warpSize);
          mine[1] = make_uint4(threadIdx.z, threadIdx.y, threadIdx.x, 0);
          mine[2] = make_uint4(blockDim.z, blockDim.y, blockDim.x, 0);
          mine[3] = make_uint4(gridDim.z, gridDim.y, gridDim.x, 0);
        }
    """)
    blocks, threads = grid[0] * grid[1] * grid[2], block[0] * block[1] * block[2]
    out = torch.full((blocks, threads, 4, 4), -1, dtype=torch.int32)
    with thread_order(order):
        module.launch("indices", grid, block, [out])

    def coordinates(shape: tuple[int, int, int]) -> Tensor:
        z, y, x = (torch.arange(n) for n in reversed(shape))
        return torch.cartesian_prod(z, y, x)

    assert out[:, :, 0, :3].equal(coordinates(grid)[:, None].expand(-1, threads, -1).int())
    assert out[:, :, 0, 3].equal((torch.arange(threads) % 32).expand(blocks, -1).int())
    assert out[:, :, 1, :3].equal(coordinates(block).expand(blocks, -1, -1).int())
    assert (out[:, :, 2, :3] == torch.tensor(block[::-1])).all()
    assert (out[:, :, 3, :3] == torch.tensor(grid[::-1])).all()


@ORDERS
def test_block_reduction(compiled: Compile, order: str) -> None:
    module = compiled("""
        #define THREADS 256
        extern "C" __global__ void __launch_bounds__(THREADS)
            sum(const double* __restrict__ x, double* __restrict__ out, long long n) {
          __shared__ double part[THREADS];
          double mine = 0.0;
          for (long long i = threadIdx.x; i < n; i += THREADS) mine += x[blockIdx.x * n + i];
          part[threadIdx.x] = mine;
          __syncthreads();
        #pragma unroll
          for (int half = THREADS / 2; half > 0; half /= 2) {
            if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
            __syncthreads();
          }
          if (threadIdx.x == 0) out[blockIdx.x] = part[0];
        }
    """)
    x = torch.rand(3, 1000, dtype=torch.float64)
    out = torch.empty(3, dtype=torch.float64)
    with thread_order(order):
        module.launch("sum", (3, 1, 1), (256, 1, 1), [x, out, 1000])
    torch.testing.assert_close(out, x.sum(1), rtol=1e-13, atol=0)


# CUDA C++ Programming Guide, Warp Shuffle Functions: lanes in segments of `width`.
SOURCES: dict[str, Callable[[int, int, int], int]] = {
    "shfl": lambda lane, n, width: lane // width * width + n % width,
    "shfl_up": lambda lane, n, width: lane - n if lane % width >= n else lane,
    "shfl_down": lambda lane, n, width: lane + n if lane % width + n < width else lane,
    "shfl_xor": lambda lane, n, width: lane ^ n if (lane ^ n) // width <= lane // width else lane,
}
DTYPES = {
    "int": torch.int32,
    "unsigned": torch.uint32,
    "long long": torch.int64,
    "unsigned long long": torch.uint64,
    "float": torch.float32,
    "double": torch.float64,
}


@pytest.mark.parametrize("operation", SOURCES)
@pytest.mark.parametrize(("name", "dtype"), DTYPES.items(), ids=DTYPES)
def test_shuffle(compiled: Compile, name: str, dtype: torch.dtype, operation: str) -> None:
    module = compiled("""
        #define KERNEL(operation)                                                          \\
          extern "C" __global__ void operation(const TYPE* in, TYPE* out, long long n,     \\
                                               long long width) {                          \\
            const int i = threadIdx.x;                                                     \\
            out[i] = width == 32 ? __##operation##_sync(0xffffffffu, in[i], int(n))        \\
                                 : __##operation##_sync(0xffffffffu, in[i], int(n), int(width)); \\
          }
        KERNEL(shfl) KERNEL(shfl_up) KERNEL(shfl_down) KERNEL(shfl_xor)
    """, ("TYPE", name))  # fmt: skip
    bits = torch.randint(-(2**62), 2**62, (64,))
    values = bits if dtype.itemsize == 8 else bits.int()
    if dtype.is_floating_point:
        values = torch.randn(64, dtype=dtype)
    values = values.view(dtype)
    for width in (32, 16, 4, 1):
        for n in (0, 1, 3, 7, 19):
            out = torch.zeros_like(values)
            with thread_order(f"shuffled({n})"):
                module.launch(operation, (1, 1, 1), (64, 1, 1), [values, out, n, width])
            source = [i // 32 * 32 + SOURCES[operation](i % 32, n, width) for i in range(64)]
            assert out.tolist() == [values.tolist()[s] for s in source], (width, n)


@ORDERS
def test_votes(compiled: Compile, order: str) -> None:
    module = compiled("""
        extern "C" __global__ void votes(const int* in, int* out) {
          const int lane = threadIdx.x;
          const unsigned mask = lane < 12 ? 0x00000fffu : 0x0ffff000u;
          if (lane >= 28) return;
          out[lane * 6 + 0] = int(__ballot_sync(mask, in[lane] & 1));
          out[lane * 6 + 1] = __any_sync(mask, in[lane] > 26);
          out[lane * 6 + 2] = __all_sync(mask, in[lane] < 12);
          out[lane * 6 + 3] = __reduce_add_sync(mask, -in[lane]);
          __syncwarp(mask);
          if (lane == 13) return;  // who has exited is not waited for
          out[lane * 6 + 4] = int(__ballot_sync(mask, 1));
          out[lane * 6 + 5] = __all_sync(mask, 1);
          __syncwarp();
        }
    """)
    out = torch.full((32, 6), -7, dtype=torch.int32)
    with thread_order(order):
        module.launch("votes", (1, 1, 1), (32, 1, 1), [torch.arange(32).int(), out])
    low = [0b1010_1010_1010, 0, 1, -sum(range(12)), 0xFFF, 1]
    high = [0xAAAA000, 1, 0, -sum(range(12, 28)), 0xFFFF000 & ~(1 << 13), 1]
    for lane in range(32):
        expected = low if lane < 12 else high if lane < 28 else [-7] * 6
        expected = [*expected[:4], -7, -7] if lane == 13 else expected
        assert out[lane].tolist() == expected, lane


def test_what_a_lane_outside_the_mask_holds_is_poison(compiled: Compile) -> None:
    module = compiled("""
        extern "C" __global__ void half_warp(float* out) {
          if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0xffffu, 1.0f, 4);
          __syncwarp();
        }
    """)
    out = torch.zeros(16)
    module.launch("half_warp", (1, 1, 1), (32, 1, 1), [out])
    assert out.isnan().tolist() == [False] * 12 + [True] * 4


@ORDERS
def test_barriers_with_predicates(compiled: Compile, order: str) -> None:
    module = compiled("""
        extern "C" __global__ void predicates(int* out, long long limit) {
          const bool below = threadIdx.x < limit;
          int* mine = out + threadIdx.x * 3;
          mine[0] = __syncthreads_count(below);
          mine[1] = __syncthreads_or(below);
          mine[2] = __syncthreads_and(below);
        }
    """)
    for limit in (0, 1, 70, 100):
        out = torch.full((100, 3), -1, dtype=torch.int32)
        with thread_order(order):
            module.launch("predicates", (1, 1, 1), (100, 1, 1), [out, limit])
        assert (out == torch.tensor([limit, limit > 0, limit == 100])).all()


@ORDERS
def test_an_exited_thread_counts_as_arrived(compiled: Compile, order: str) -> None:
    module = compiled("""
        extern "C" __global__ void leave(int* out) {
          __shared__ int value;
          if (threadIdx.x % 3 == 0) return;
          if (threadIdx.x == 1) value = 5;
          __syncthreads();
          out[threadIdx.x] = value;
          if (threadIdx.x % 3 == 1) return;
          out[threadIdx.x] += __syncthreads_count(1);
        }
    """)
    out = torch.zeros(70, dtype=torch.int32)
    with thread_order(order):
        module.launch("leave", (1, 1, 1), (70, 1, 1), [out])
    assert out.tolist() == [(0, 5, 5 + 23)[i % 3] for i in range(70)]


def test_atomics(compiled: Compile) -> None:
    module = compiled("""
        template <class T>
        __device__ void accumulate(T* out, T x) {
          atomicAdd(out, x);
          atomicMax(out + 1, x);
          atomicMin(out + 2, x);
        }
        extern "C" __global__ void atomics(int* i, unsigned* u, unsigned long long* l, float* f,
                                           double* d, int* old) {
          const int n = blockIdx.x * blockDim.x + threadIdx.x;
          accumulate(i, -n);
          accumulate(u, 3000000000u + n);
          accumulate(l, (1ull << 63) + n);
          atomicAdd(f, 0.5f * n);
          atomicAdd(d, 0.25 * n);
          old[n] = atomicAdd(i + 3, 2);
        }
    """)
    i = torch.tensor([0, -(2**31), 2**31 - 1, 0], dtype=torch.int32)
    u = torch.tensor([0, 0, 2**32 - 1], dtype=torch.uint32)
    long = torch.tensor([0, 0, 2**64 - 1], dtype=torch.uint64)
    f, d = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    old = torch.zeros(200, dtype=torch.int32)
    module.launch("atomics", (4, 1, 1), (50, 1, 1), [i, u, long, f, d, old])
    total = sum(range(200))
    assert i.tolist() == [-total, 0, -199, 400]
    assert u.tolist() == [(200 * 3_000_000_000 + total) % 2**32, 3_000_000_199, 3_000_000_000]
    assert long.tolist() == [(200 * 2**63 + total) % 2**64, 2**63 + 199, 2**63]
    assert (f.item(), d.item()) == (0.5 * total, 0.25 * total)
    assert old.sort().values.tolist() == list(range(0, 400, 2))


def test_bits_and_arithmetic(compiled: Compile) -> None:
    module = compiled("""
        __constant__ float three[1] = {3.0f};
        extern "C" __global__ void bits(double* out) {
          const auto put = [&](double x) { *out++ = x; };
          put(__popc(0xf0f0u)), put(__popcll(~0ull)), put(__clz(1)), put(__clz(0)), put(__clz(-1));
          put(__clzll(1)), put(__clzll(0)), put(__ffs(0)), put(__ffs(8)), put(__ffsll(1ll << 40));
          put(__float_as_uint(1.0f)), put(__uint_as_float(0x40000000u)), put(__float_as_int(-2.0f));
          put(__int_as_float(0x3f000000)), put(double(__double_as_longlong(2.0) >> 52));
          put(__longlong_as_double(1023ll << 52)), put(__ldg(three));
          put(min(-1, 2)), put(max(-1, 2)), put(max(3u, 2)), put(min(1ll << 40, 2ll));
          put(max(nanf(""), 1.0f)), put(min(nanf(""), 1.0f)), put(min(1.0, double(NAN)));
          put(fma(2.0, 3.0, 1.0)), put(scalbn(1.5, 3)), put(ldexp(1.5f, 2)), put(rsqrtf(4.0f));
          put(exp2f(3.0f)), put(__expf(0.0f)), put(isnan(0.0f / three[0]) + 2 * isinf(1e300 * 1e300));
          put(alignof(float2)), put(alignof(int4)), put(alignof(ulonglong2)), put(sizeof(uint3));
          static_assert(sizeof(make_double2(1, 2)) == 16 && alignof(longlong2) == 16, "");
          __threadfence(), __threadfence_block(), assert(three[0] == 3.0f);
        }
    """)
    expected = [8, 64, 31, 32, 0, 63, 64, 0, 4, 41]
    expected += [0x3F800000, 2, -(2**30), 0.5, 1024, 1, 3]
    expected += [-1, 2, 3, 2, 1, 1, 1, 7, 12, 6, 0.5, 8, 1, 2, 8, 16, 16, 12]
    out = torch.zeros(len(expected) + 1, dtype=torch.float64)
    module.launch("bits", (1, 1, 1), (1, 1, 1), [out])
    assert out.tolist() == [*expected, 0]


def test_shared_memory_starts_as_nan_in_each_block(compiled: Compile) -> None:
    module = compiled("""
        extern "C" __global__ void read_first(float* out) {
          __shared__ float fixed[2];
          float* const dynamic = dynamic_shared<float>();
          out[blockIdx.x * 2] = fixed[1];
          out[blockIdx.x * 2 + 1] = dynamic[2];
          fixed[1] = dynamic[2] = 1.0f;
        }
    """)
    out = torch.zeros(3, 2)
    module.launch("read_first", (3, 1, 1), (1, 1, 1), [out], shared_bytes=12)
    assert out.isnan().all()


@ORDERS
def test_nothing_runs_in_an_empty_grid(compiled: Compile, order: str) -> None:
    module = compiled('extern "C" __global__ void set(int* x) { *x = 1; }')
    x = torch.zeros(1, dtype=torch.int32)
    with thread_order(order):
        module.launch("set", (1, 0, 1), (1, 1, 1), [x])
    assert x.item() == 0
    module.launch("set", (1, 1, 1), (1, 1, 1), [x])
    assert x.item() == 1


CONVERSIONS = """
    extern "C" __global__ void widen(const unsigned short* in, float* out) {
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      out[i] = half_to_float(in[i]);
    }
    extern "C" __global__ void narrow(const float* in, unsigned short* half,
                                      unsigned short* bfloat16, long long n) {
      const long long i = blockIdx.x * (long long)(blockDim.x) + threadIdx.x;
      if (i >= n) return;
      half[i] = float_to_half(in[i]);
      bfloat16[i] = float_to_bfloat16(in[i]);
    }
    extern "C" __global__ void tanh_of(const float* in, float* out) {
      out[blockIdx.x] = tanh_approximate(in[blockIdx.x]);
    }
    extern "C" __global__ void copy(const uint4* in, uint4* out) {
      store_streaming(out, load_streaming(in));
    }
"""


def assert_same_numbers(x: Tensor, y: Tensor) -> None:
    """Bitwise, except for the payload of NaN."""
    assert x.dtype == y.dtype
    assert x.isnan().equal(y.isnan())
    bits = {2: torch.int16, 4: torch.int32}[x.itemsize]
    assert torch.where(x.isnan(), 0, x).view(bits).equal(torch.where(y.isnan(), 0, y).view(bits))


def test_every_half(compiled: Compile) -> None:
    module = compiled(CONVERSIONS)
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    out = torch.empty(2**16)
    module.launch("widen", (256, 1, 1), (256, 1, 1), [halves, out])
    assert_same_numbers(out, halves.float())


def test_rounding_of_floats(compiled: Compile) -> None:
    module = compiled(CONVERSIONS)
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    # Each 16-bit number, the middle between neighbours, and the floats around both.
    ends = torch.cat([every.view(torch.float16).float(), every.view(torch.bfloat16).float()])
    ends = torch.cat([ends, (ends + ends.roll(-1)) / 2]).view(torch.int32)
    random = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32)
    x = torch.cat([ends - 1, ends, ends + 1, random]).view(torch.float32)
    half, bfloat16 = (
        torch.empty_like(x, dtype=torch.half),
        torch.empty_like(x, dtype=torch.bfloat16),
    )
    module.launch("narrow", (-(-len(x) // 256), 1, 1), (256, 1, 1), [x, half, bfloat16, len(x)])
    assert_same_numbers(half, x.half())
    assert_same_numbers(bfloat16, x.bfloat16())


def test_approximate_tanh(compiled: Compile) -> None:
    x = torch.cat([torch.linspace(-10, 10, 5000), torch.tensor([0.0, torch.inf, -torch.inf])])

    def relative_error(module: EmulatedModule) -> Tensor:
        out = torch.empty_like(x)
        module.launch("tanh_of", (len(x), 1, 1), (1, 1, 1), [x, out])
        assert (out.abs() <= 1).all()
        return (out.double() - x.double().tanh()).abs() / x.double().tanh().abs().clamp_min(1e-30)

    assert 2**-11.5 < relative_error(compiled(CONVERSIONS)).max() < 2**-10.99
    assert relative_error(compiled(CONVERSIONS, ("EMULATOR_EXACT_TANH", "1"))).max() < 2**-22


def test_streaming_copies(compiled: Compile) -> None:
    x, y = torch.arange(4).int(), torch.zeros(4, dtype=torch.int32)
    compiled(CONVERSIONS).launch("copy", (1, 1, 1), (1, 1, 1), [x, y])
    assert y.equal(x)


# ---- order and concurrency

TICKETS = """
    extern "C" __global__ void tickets(int* next, int* order) {
      order[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
    }
    extern "C" __global__ void tickets_after_a_barrier(int* next, int* order) {
      __syncthreads();
      order[atomicAdd(next, 1)] = threadIdx.x;
    }
"""


@pytest.mark.parametrize(
    ("kernel", "grid", "block"),
    [("tickets", 1, 100), ("tickets", 100, 1), ("tickets_after_a_barrier", 1, 100)],
)
def test_order(compiled: Compile, kernel: str, grid: int, block: int) -> None:
    module = compiled(TICKETS)

    def order_of(order: str) -> list[int]:
        tickets = torch.full((100,), -1, dtype=torch.int32)
        next_ticket = torch.zeros(1, dtype=torch.int32)
        with thread_order(order):
            module.launch(kernel, (grid, 1, 1), (block, 1, 1), [next_ticket, tickets])
        return tickets.tolist()

    ascending = list(range(100))
    assert order_of("ascending") == ascending
    assert order_of("descending") == ascending[::-1]
    shuffled = [order_of(f"shuffled({seed})") for seed in (1, 2)]
    assert shuffled[0] == order_of("shuffled(1)") != shuffled[1]
    for order in shuffled:
        assert sorted(order) == ascending
        assert order not in (ascending, ascending[::-1])


def test_orders_tell_a_race(compiled: Compile) -> None:
    module = compiled("""
        #define NEIGHBOUR(name, barrier)                          \\
          extern "C" __global__ void name(const int* in, int* out) { \\
            __shared__ int values[64];                            \\
            values[threadIdx.x] = in[threadIdx.x];                \\
            barrier;                                              \\
            out[threadIdx.x] = values[threadIdx.x ^ 1];           \\
          }
        NEIGHBOUR(racy, )
        NEIGHBOUR(right, __syncthreads())
    """)
    x = torch.arange(64).int()
    results: dict[str, set[tuple[int, ...]]] = {"racy": set(), "right": set()}
    for name, seen in results.items():
        for order in ("ascending", "descending", "shuffled(1)", "shuffled(2)"):
            out = torch.zeros_like(x)
            with thread_order(order):
                module.launch(name, (1, 1, 1), (64, 1, 1), [x, out])
            seen.add(tuple(out.tolist()))
    assert len(results["racy"]) == 4
    assert results["right"] == {tuple(i ^ 1 for i in range(64))}


def test_races_are_told(compiled: Compile) -> None:
    module = compiled(
        """
        extern "C" __global__ void of_block(int* x, long long is_right) {
          __shared__ int values[64];
          values[threadIdx.x] = x[threadIdx.x];
          if (is_right) __syncthreads();
          x[threadIdx.x] = values[63 - threadIdx.x];
        }
        extern "C" __global__ void of_warp(int* x, long long is_right) {
          const int mine = x[threadIdx.x ^ 1] + 1;
          const bool all = __any_sync(0xffffffffu, mine);  // orders no memory
          if (is_right) __syncwarp();
          x[threadIdx.x] = mine + all;
        }
        extern "C" __global__ void of_atomics(int* x, long long is_right) {
          if (threadIdx.x == 0) x[0] = 0;
          if (is_right) __syncthreads();
          atomicAdd(x, 1);
          if (is_right) __syncthreads();
          x[threadIdx.x + 1] = x[0];
        }
        extern "C" __global__ void of_blocks(int* x, long long is_right) {
          if (threadIdx.x == 0) x[is_right ? blockIdx.x : 0] += 1;
        }
        """,
        watched=True,
    )
    told = []
    for kernel in module.kernels:
        threads = 32 if kernel == "of_warp" else 64
        grid, block = (2 if kernel == "of_blocks" else 1, 1, 1), (threads, 1, 1)
        module.launch(kernel, grid, block, [torch.zeros(65).int(), 1])
        told.append(message(module, kernel, [torch.zeros(65).int(), 0], block, grid))
    assert_expected_inline(
        "\n".join(told),
        """\
race: write at test.cu:3 by thread (32,0,0) of what thread (31,0,0) has read at test.cu:5, with no barrier between, in block (0,0,0) of kernel 'of_block'
race: write at test.cu:11 by thread (0,0,0) of what thread (1,0,0) has read at test.cu:8, with no barrier between, in block (0,0,0) of kernel 'of_warp'
race: write at test.cu:16 by thread (1,0,0) of what thread (0,0,0) has written at test.cu:14, with no barrier between, in block (0,0,0) of kernel 'of_atomics'
race: read at test.cu:21 by thread (0,0,0) of what thread (0,0,0) of block 0 has written at test.cu:21, with no barrier between, in block (1,0,0) of kernel 'of_blocks'""",
    )


def test_watched_threads_take_turns_between_accesses(compiled: Compile) -> None:
    text = """
        extern "C" __global__ void draw(int* tickets, int* out) {
          for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = atomicAdd(tickets, 1);
        }
    """
    for watched in (False, True):
        out = torch.empty(64, 4, dtype=torch.int32)
        with thread_order("shuffled(1)"):
            module = compiled(text, watched=watched)
            module.launch("draw", (1, 1, 1), (64, 1, 1), [torch.zeros(1).int(), out])
        assert out.flatten().sort().values.equal(torch.arange(256).int())
        in_a_row = (out.diff() == 1).all(1)
        assert bool(in_a_row.all()) is not watched


@pytest.mark.parametrize("order", ["", "random", "shuffled", "ascending(1)", "shuffled(x)"])
def test_unknown_order(order: str) -> None:
    with pytest.raises(ValueError, match="expected ascending, descending or shuffled"):
        thread_order(order).__enter__()


def signal_handlers() -> list[bytes]:
    """What the kernel would call for each signal that the emulator uses, and on which stack."""
    libc = ctypes.CDLL(None)
    states = []
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL):
        action = ctypes.create_string_buffer(256)
        assert libc.sigaction(int(number), None, action) == 0
        states.append(action.raw[:8] + action.raw[136:140])  # sa_handler and sa_flags
    stack = ctypes.create_string_buffer(64)
    assert libc.sigaltstack(None, stack) == 0
    return [*states, stack.raw[:12]]  # ss_sp and ss_flags


def test_two_launches_at_once(compiled: Compile) -> None:
    """One keeps failing, which must not disturb the other."""
    module = compiled("""
        extern "C" __global__ void steps(long long* x, long long n) {
          __shared__ long long shared[64];
          for (long long i = 0; i < n; ++i) {
            shared[threadIdx.x] = x[threadIdx.x] + __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
            __syncthreads();
            x[threadIdx.x] = shared[(threadIdx.x + 1) % 64] % 1000003;
            __syncthreads();
          }
        }
        extern "C" __global__ void fault(int* x) {
          __syncthreads();
          if (threadIdx.x == 7) x[4] = 0;
          __syncthreads();
        }
    """)
    expected = start = torch.randint(1000, (64,))
    for _ in range(300):
        pairs = expected + expected.view(32, 2).flip(1).view(64)
        expected = pairs.roll(-1) % 1000003
    before = signal_handlers()
    both_run = threading.Barrier(2, timeout=120)
    results: list[Tensor] = []
    errors: list[str] = []

    def compute() -> None:
        both_run.wait()
        for _ in range(20):
            x = start.clone()
            module.launch("steps", (1, 1, 1), (64, 1, 1), [x, 300])
            results.append(x)

    def fault() -> None:
        both_run.wait()
        x = guarded(torch.zeros(4, dtype=torch.int32))
        errors.extend(message(module, "fault", [x], (64, 1, 1)) for _ in range(200))

    threads = [threading.Thread(target=target) for target in (compute, fault)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    assert all(result.equal(expected) for result in results)
    assert len(errors) == 200
    assert all(re.match(r"out-of-bounds \w+ .* by thread \(7,0,0\)", error) for error in errors)
    assert signal_handlers() == before


# ---- what wrong kernels are told


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
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(TESTS)!r}]
import torch
from test_emulator import EmulatedModule, KernelSource, message, signal_handlers
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


# ---- guarded memory and the cache of libraries


@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.int64])
def test_guarded_copies(dtype: torch.dtype, side: str) -> None:
    x = torch.randn(3, 5, requires_grad=True).to(dtype).T
    y = guarded(x, side)
    assert y.equal(x)
    assert (y.dtype, y.is_contiguous(), y.requires_grad) == (dtype, True, False)
    assert y.data_ptr() % 16 == 0
    end = y.data_ptr() + y.nbytes
    assert (-end % 4096 < 16) if side == "end" else y.data_ptr() % 4096 == 0
    exact = guarded(x, alignment=y.itemsize)
    assert (exact.data_ptr() + exact.nbytes) % 4096 == 0
    assert guarded(x[:0], side).shape == (0, 3)


def test_guarded_memory_is_freed() -> None:
    x = guarded(torch.zeros(100))
    start = f"{x.data_ptr() // 4096 * 4096:x}-"
    assert start in Path("/proc/self/maps").read_text()
    del x
    gc.collect()
    assert start not in Path("/proc/self/maps").read_text()


def test_kernels_are_found_in_any_dress() -> None:
    text = """
        struct alignas(16) S { int x; };
        __device__ int helper(int x) { return x; }
        extern "C" __global__ void plain(float* a);
        extern "C" __launch_bounds__(N, 2) __global__ void before(long long n) { if (n) helper(1); }
        extern "C" __global__ __attribute__((used)) void
            __launch_bounds__(32 * (W))
            after (double x) {}
        template <class T> __global__ void no_entry_point(T* x) {}
    """
    expected = {"plain": "1024", "before": "N, 2", "after": "32 * (W)"}
    assert find_kernels(text) == expected


def test_names_of_the_c_library(compiled: Compile) -> None:
    module = compiled("""
        #if VARIANT == 2
        extern "C" __global__ void gamma(int*) {}
        #else
        extern "C" __global__ void select(int* select) { *select = VARIANT; }
        #endif
    """, ("VARIANT", "7"))  # fmt: skip
    assert module.kernels == ("select",)
    x = torch.zeros(1, dtype=torch.int32)
    module.launch("select", (1, 1, 1), (1, 1, 1), [x])
    assert x.item() == 7


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNT_OP_EMULATOR_CACHE", str(tmp_path / "cache"))
    header, text = tmp_path / "value.cuh", tmp_path / "test.cu"
    header.write_text("#pragma once\nconstexpr int value = 1;\n")
    text.write_text('#include "value.cuh"\nextern "C" __global__ void k(int* x) { *x = value; }\n')

    def path(*macros: tuple[str, str], checked: bool = True) -> Path:
        return build_kernels(KernelSource("test", macros, tmp_path), checked=checked)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the emulator's own headers give none
        first = path()
    paths = [first, path(("A", "1")), path(checked=False)]
    header.write_text("#pragma once\nconstexpr int value = 2;\n")
    paths.append(path())
    assert len(set(paths)) == 4
    folders = {library.parent for library in (tmp_path / "cache").glob(f"*/{build.LIBRARY}")}
    assert folders == {entry.parent for entry in paths}
    header.write_text("#pragma once\nconstexpr int value = 1;\n")
    with monkeypatch.context() as context:
        context.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
        assert path() == first
    header.write_text("#pragma once\nconstexpr int value = ;\n")
    with pytest.raises(EmulatorError, match=r"value\.cuh:2"):
        path()
    text.write_text('extern "C" __global__ void k(int* unused) {}\n')
    with pytest.warns(UserWarning, match="unused parameter"):
        path()
    assert {library.parent for library in (tmp_path / "cache").glob(f"*/{build.LIBRARY}")} > folders


def test_cache_folder_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test.cu").write_text('extern "C" __global__ void k() {}')
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    monkeypatch.setenv("RNNT_OP_EMULATOR_CACHE", str(open_folder))
    with pytest.raises(EmulatorError, match="only this user can write to"):
        EmulatedModule(KernelSource("test", (), tmp_path))


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test.cu").write_text('extern "C" __global__ void k() {}')
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "_compiler_version", build._compiler_version.__wrapped__)
    with pytest.raises(EmulatorError, match=r"the emulator needs g\+\+ \(or CXX\)"):
        EmulatedModule(KernelSource("test", (), tmp_path))
