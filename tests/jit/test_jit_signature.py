"""What kernels take, as their sources say, and the bits of arguments."""

import ctypes
import math
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from rnnt_op import topologies
from rnnt_op.backends.kernels import Kernels, variants
from rnnt_op.backends.sources import CPU, CUDA, Sources
from rnnt_op.jit import ArgumentError, KernelSource
from rnnt_op.jit.cuda_module import ArgumentBlock
from rnnt_op.jit.signature import Parameter, Signature, signatures
from rnnt_op.validation import FLOAT_DTYPES

SOURCE = """#include "anything.h"
// extern "C" void commented(int x) {
extern "C" void declared(int x);
static void inside(int x) { }
template <typename T> struct Pair { T first, second; };
extern "C" __global__ void __launch_bounds__(SIZE * (2), 1) kernel(
    const STATE* __restrict__ states, long long pitch,  /* rows, and */
#if MASKED
    const std::int64_t* mask, std::uint64_t threshold,
#else
    const long long *order,
#endif
    unsigned char* flags, bool * truth, const void* anything, double scale
) {
  if (pitch) { kernel(states); }
}
extern "C" void nothing() {}
extern "C" void unnamed(long long, double, short*) {}
"""


def read(folder: Path, text: str = SOURCE, **macros: str) -> dict[str, Signature]:
    (folder / "test.cpp").write_text(text)
    return dict(signatures(KernelSource("test", tuple(macros.items()), folder, ".cpp")))


def written(signature: Signature) -> str:
    parameters = (
        f"{p.name} {p.code} {' '.join(str(dtype)[6:] for dtype in p.dtypes)}".rstrip()
        for p in signature.parameters
    )
    return f"{signature.kernel}({', '.join(parameters)})"


def test_signatures(tmp_path: Path) -> None:
    found = read(tmp_path, STATE="bfloat16", MASKED="1")
    found["other"] = read(tmp_path, STATE="float", MASKED="0")["kernel"]
    assert_expected_inline(
        "\n".join(map(written, found.values())),
        """\
kernel(states Q bfloat16, pitch q, mask Q int64, threshold q, flags Q uint8 bool, truth Q bool, anything Q, scale d)
nothing()
unnamed(parameter 0 q, parameter 1 d, parameter 2 Q int16)
kernel(states Q float32, pitch q, order Q int64, flags Q uint8 bool, truth Q bool, anything Q, scale d)""",
    )


@pytest.mark.parametrize("parameter", ["int n", "float x", "Pair<int>* pairs", "double** rows"])
def test_other_types_are_refused(parameter: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no type that kernels take") as error:
        read(tmp_path, f'extern "C" void kernel(long long threads, {parameter}) {{}}')
    assert str(error.value).startswith("kernel in test.cpp: ")
    assert str(error.value).endswith(parameter)


@pytest.mark.parametrize("sources", [CPU, CUDA])
def test_every_kernel_of_the_package_is_read(sources: Any) -> None:
    names = set()
    for dtype in FLOAT_DTYPES:
        for kernels in variants(dtype, "tanh", topologies.RNNT):
            for source in sources.needed(kernels):
                found = signatures(source)
                text = source.text
                assert len(found) == text.count('extern "C"') > 0
                for signature in found.values():
                    assert all(" " not in p.name for p in signature.parameters)
                    names.add(signature.kernel)
    assert names > {"hidden", "joint_gradient", "symbol_scores", "forward_backward", "occupancies"}


def signature(folder: Path) -> Signature:
    text = """extern "C" void kernel(
        const float* a, bfloat16* b, void* any, long long n, double scale) {}"""
    return read(folder, text)["kernel"]


def test_values(tmp_path: Path) -> None:
    a, b = torch.zeros(5)[2:], torch.zeros(3, dtype=torch.bfloat16)
    values = signature(tmp_path).values
    assert values([a, None, b, True, 0.5]) == [a.data_ptr(), 0, b.data_ptr(), 1, 0.5]
    parameter = torch.nn.Parameter(a)
    assert values([parameter, b, a, -(2**63), math.inf])[0] == a.data_ptr()


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    a, b = torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)
    right = [a, b, a, 3, 0.5]

    def message(place: int, argument: Any, gpu: int | None = None) -> str:
        arguments = [*right[:place], argument, *right[place + 1 :]]
        with pytest.raises(ArgumentError) as error:
            signature(tmp_path).values(arguments, gpu)
        return str(error.value)

    with pytest.raises(ArgumentError) as error:
        signature(tmp_path).values(right[:4])
    messages = [
        str(error.value),
        message(1, a),
        message(0, 3),
        message(2, a.to("meta")),
        message(3, a),
        message(3, None),
        message(3, 1.0),
        message(3, 2**63),
        message(4, 1),
        message(4, "1"),
        message(0, a, gpu=1),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
kernel in test.cpp: expected 5 arguments (a, b, any, n, scale), got 4
kernel in test.cpp: expected b as a tensor of torch.bfloat16, got a tensor of torch.float32
kernel in test.cpp: expected a as a tensor or None, got 3
kernel in test.cpp: expected any as a tensor on the CPU, got one on meta
kernel in test.cpp: expected n as an int of 64 bits, got a tensor of torch.float32
kernel in test.cpp: expected n as an int of 64 bits, got None
kernel in test.cpp: expected n as an int of 64 bits, got 1.0
kernel in test.cpp: expected n as an int of 64 bits, got 9223372036854775808
kernel in test.cpp: expected scale as a float, got 1
kernel in test.cpp: expected scale as a float, got '1'
kernel in test.cpp: expected a as a tensor on cuda:1, got one on cpu""",
    )


# ---- bits


def packed(codes: str, *numbers: float) -> list[bytes]:
    """The eight bytes that each pointer leads to."""
    block = ArgumentBlock(codes)
    address = block.filled(numbers)
    assert ctypes.sizeof(block.values) == ctypes.sizeof(block.pointers) == 8 * len(numbers)
    assert ctypes.addressof(block.pointers) == address
    first = ctypes.addressof(block.values)
    assert list(block.pointers) == [first + 8 * i or None for i in range(len(numbers))]
    return [ctypes.string_at(pointer, 8) for pointer in block.pointers]


def test_threads_have_their_own() -> None:
    """While one launches, another may fill its arguments for the same kernel."""
    block = ArgumentBlock("q")
    address = block.filled([1])
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: (block.filled([2]), list(block.values))).result()
    assert other[0] != address
    assert other[1] == [2]
    assert list(block.values) == [1]
    assert block.filled([3]) == address
    assert list(block.values) == [3]


def test_each_kind_bit_for_bit() -> None:
    address = torch.zeros(5).data_ptr()
    assert packed("QQqqqq", address, 0, 1, -1, 2**63 - 1, -(2**63)) == [
        struct.pack("<Q", address),
        bytes(8),
        b"\x01" + bytes(7),
        b"\xff" * 8,
        b"\xff" * 7 + b"\x7f",
        bytes(7) + b"\x80",
    ]
    assert packed("ddd", 0.1, -0.0, math.inf) == [
        bytes.fromhex("9a9999999999b93f"),
        bytes(7) + b"\x80",
        bytes.fromhex("000000000000f07f"),
    ]
    (nan,) = packed("d", math.nan)
    assert math.isnan(struct.unpack("<d", nan)[0])
    assert packed("") == []


def parameters_by_kernel(language: Sources) -> dict[str, list[Parameter]]:
    """Without what a CPU's functions take first: its threads."""
    found = {}
    for result in ("gradients", "paths"):
        kernels = Kernels(torch.float64, input_dtype=torch.float64, has_dropout=True, result=result)
        for source in language.needed(kernels):
            for name, signature in signatures(source).items():
                found[name] = [p for p in signature.parameters if p.name != "threads"]
    found.pop("use_parallel", None)
    return found


def test_both_languages_have_the_same_parameters() -> None:
    """In the same order and of the same kinds, except what this names."""
    gpu, cpu = parameters_by_kernel(CUDA), parameters_by_kernel(CPU)
    report = []
    for kernel in sorted(gpu | cpu):
        if kernel not in gpu or kernel not in cpu:
            report.append(f"{kernel}: in {'.cu' if kernel in gpu else '.cpp'} alone")
            continue
        both = {p.name for p in gpu[kernel]} & {p.name for p in cpu[kernel]}
        of_gpu, of_cpu = ([p for p in of[kernel] if p.name in both] for of in (gpu, cpu))
        assert [(p.name, p.code) for p in of_gpu] == [(p.name, p.code) for p in of_cpu]
        assert all(set(b.dtypes) <= set(a.dtypes) for a, b in zip(of_gpu, of_cpu, strict=True))
        for suffix, of in ((".cu", gpu), (".cpp", cpu)):
            alone = ", ".join(p.name for p in of[kernel] if p.name not in both)
            if alone:
                report.append(f"{kernel}: {suffix} takes {alone}, too")
    assert_expected_inline(
        "\n".join(report),
        """\
best_paths: .cpp takes sample_count, too
count_kept: in .cu alone
forward_backward: .cu takes scratch, scratch_pitch, too
forward_backward: .cpp takes sample_count, too
gradient_mass: in .cu alone
joint_gradient: .cu takes d_hidden_pitch, hidden_pitch, packed_pitch, state_sample, first_frame, frames, sums, sums_pitch, too
joint_gradient: .cpp takes encoder_sums, predictor_sums, too
logit_gradient: .cpp takes column_stride, frame_place, state_place, gradient, gradient_pitch, frame_target, state_target, too
node_rows: .cpp takes frame_count, too
occupancies: .cu takes frame, node_count, too
occupancies: .cpp takes frame_count, too
pack: .cpp takes sample_count, too
reach: in .cpp alone
scan_counts: in .cu alone
select_nodes: in .cpp alone
symbol_scores: .cpp takes column_stride, frame_place, state_place, frame, too
thresholds: in .cu alone
write_kept: in .cu alone""",
    )


def test_arguments_by_name(tmp_path: Path) -> None:
    a, b = torch.zeros(2), torch.zeros(3, dtype=torch.bfloat16)
    named = {"scale": 0.5, "n": 7, "any": a, "b": b, "a": a, "other": object()}
    assert signature(tmp_path).values(named) == signature(tmp_path).values([a, b, a, 7, 0.5])
    del named["n"], named["b"]
    with pytest.raises(ArgumentError) as error:
        signature(tmp_path).values(named)
    assert_expected_inline(str(error.value), """kernel in test.cpp: no argument for b, n""")
