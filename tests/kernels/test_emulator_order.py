"""The CUDA emulator itself: the order of threads, and launches at once."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from emulator import guarded, thread_order
from emulator_support import Compile, message, signal_handlers
from expecttest import assert_expected_inline
from torch import Tensor

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
