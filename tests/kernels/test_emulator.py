"""The CUDA emulator itself: what right kernels compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulator import EmulatedModule, thread_order
from emulator_support import ORDERS, Compile
from torch import Tensor


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
