"""The CUDA path on a GPU that is not there, up to the driver.

Each call is first made on a CPU, where the emulator runs the kernels, with a page that must not be
touched behind every argument's memory. The same call with CUDA tensors must then launch the same
kernels with the same memory, and the launches must fit the cubins.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import jit_support
import pytest
import torch
from emulated import EmulatedDevice, emulated_backend
from emulator import guarded
from problems import random_joint
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

import rnnt_op
from rnnt_op import backends, shards, task, topologies
from rnnt_op.backends.cuda import CudaBackend
from rnnt_op.backends.cuda_device import CudaDevice
from rnnt_op.backends.device import Shape
from rnnt_op.backends.sources import CUDA
from rnnt_op.jit import Argument, ArgumentError, DriverError, KernelSource, load_module
from rnnt_op.jit.build import build
from rnnt_op.jit.cuda_compiler import CudaCompiler
from rnnt_op.jit.ptxas import usages
from rnnt_op.jit.signature import signatures
from rnnt_op.topology import RNNT, Topology

nvrtc = jit_support.nvrtc
pytestmark = [
    pytest.mark.usefixtures("nvrtc"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(
        torch.version.cuda is None, reason="needs a torch for CUDA: another has no CUDA tensors"
    ),
]

GPUS = {(7, 5): 64, (8, 0): 163, (9, 0): 227, (12, 0): 99}  # KiB that a block may share

BLANKS = topologies.multi_blank()
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """A call of the public functions, and on what."""

    name: str
    dtype: torch.dtype = F32
    topology: Topology = RNNT
    function: Literal["loss", "given", "posteriors", "align"] = "loss"
    sizes: dict[str, Any] = field(default_factory=dict)  # of ``random_joint``
    options: dict[str, Any] = field(default_factory=dict)
    is_additive: bool = False
    is_restricted: bool = False
    is_shared: bool = False  # the vocabulary by two ranks
    lengths_on: Literal["host", "device"] = "host"
    autocast: torch.dtype | None = None
    wants: tuple[str, ...] = ("encoder", "predictor", "weight", "bias", "logits")
    capability: tuple[int, int] = (9, 0)

    def __str__(self) -> str:
        return self.name


SMALL = {"workspace_bytes": 150_000}  # several groups
NONE = {"reduction": "none", **SMALL}
DROPOUT = {"dropout": 0.3}
ADDITIVE = {"activation": "identity"}
ODD = {"joint_dim": 33, "vocab_size": 57}  # rows are padded
CASES = [
    Case("many-chunks", sizes={"vocab_size": 300}, options=SMALL),
    Case("row-by-row", sizes={"batch": 2, "frames": 3}, options={"workspace_bytes": 1}),
    Case("default-workspace", BF16),
    Case("float64", F64, sizes=ODD, options=SMALL),
    Case("bfloat16", BF16, sizes=ODD, options=SMALL),
    Case("float16", F16, sizes={"bias": False}, options=NONE),
    Case("sm_75-bfloat16", BF16, sizes=ODD, options=SMALL, capability=(7, 5)),
    Case("sm_80-dropout", BF16, options=SMALL | DROPOUT, capability=(8, 0)),
    Case("sm_120-none", options=NONE, capability=(12, 0)),
    Case("autocast", autocast=BF16, options=SMALL, lengths_on="device"),
    Case("autocast-dropout-none", autocast=F16, options=NONE | DROPOUT),
    Case("ranges", is_restricted=True, options=SMALL),
    Case("ranges-on-device", BF16, is_restricted=True, options=NONE, lengths_on="device"),
    Case("additive", is_additive=True, options=SMALL | ADDITIVE),
    Case("additive-ranges", BF16, is_additive=True, is_restricted=True, options=NONE | ADDITIVE),
    Case("given-clamped", BF16, function="given", options=NONE | {"clamp": 0.1}),
    Case("given-ranges", F64, function="given", is_restricted=True, options=NONE),
    Case("log-probs", function="given", options=NONE | {"fused_log_softmax": False}),
    Case("shared", is_shared=True, options=SMALL),
    Case("shared-dropout-none", BF16, is_shared=True, options=NONE | DROPOUT, lengths_on="device"),
    Case("shared-hat", is_shared=True, options=SMALL | {"normalizer": "hat"}),
    Case("posteriors", function="posteriors"),
    Case("posteriors-ranges", BF16, function="posteriors", is_restricted=True, is_shared=True),
    Case("align", function="align"),
    Case("align-tdt", F64, topologies.tdt(), function="align", lengths_on="device"),
    Case("losses-alone", wants=(), options=SMALL),
    Case("weight-alone", BF16, wants=("weight",), options=SMALL),
    Case("predictor-alone", wants=("predictor",), options=NONE),
    Case("all-nodes", options=SMALL | {"zero_infinity": True, "gradient_tolerance": 0.0}),
    Case("modified", topology=topologies.modified(), options=SMALL),
    Case("constrained", topology=topologies.constrained(), options=SMALL),
    Case("star", topology=topologies.star(), options=NONE),
    Case("tdt", BF16, topologies.tdt(), options=SMALL),
    Case("hat", options=SMALL | {"normalizer": "hat"}),
    Case("no-labels", sizes={"labels": 0}, options=SMALL),
    Case("long-frames", BF16, sizes={"batch": 2, "frames": 3, "labels": 260} | ODD),
    Case("long-states", F64, sizes={"batch": 2, "frames": 260, "labels": 3} | ODD),
    # More states than shared memory has room for.
    Case("scratch", topology=BLANKS, sizes={"batch": 1, "frames": 2, "labels": 600}),
]


@dataclass(frozen=True)
class Launch:
    """What a call of the device says."""

    source: str
    macros: tuple[tuple[str, str], ...]
    kernel: str
    shape: Shape
    arguments: dict[str, object]


def described(argument: Argument) -> object:
    if not isinstance(argument, Tensor):
        return argument
    size = argument.untyped_storage().nbytes()
    return argument.dtype, argument.shape, argument.stride(), argument.storage_offset(), size


def taken(source: KernelSource, kernel: str, arguments: dict[str, Argument]) -> dict[str, Argument]:
    """Those that the kernel has parameters for, in their order."""
    return {p.name: arguments[p.name] for p in signatures(source)[kernel].parameters}


def within_pages(arguments: dict[str, Argument]) -> Iterator[tuple[str, Argument]]:
    """The arguments in memory of their own, whose end is the end of what was allocated."""
    copies: dict[int, Tensor] = {}
    for name, argument in arguments.items():
        if isinstance(argument, Tensor) and argument.numel() > 0:
            storage = argument.untyped_storage()
            whole = torch.empty(0, dtype=argument.dtype).set_(storage)
            copy = copies.setdefault(storage.data_ptr(), guarded(whole))
            assert copy.dtype == argument.dtype
            offset = copy.storage_offset() + argument.storage_offset()
            yield name, copy.as_strided(argument.shape, argument.stride(), offset)
        else:
            yield name, argument


@contextmanager
def emulation(launches: list[Launch], reads: Any) -> Iterator[None]:
    """Calls on CPU tensors run emulated kernels, and are noted."""
    call, read, tolist = CudaDevice.call, EmulatedDevice.read, Tensor.tolist

    def noted(
        self: CudaDevice,
        source: KernelSource,
        kernel: str,
        shape: Shape,
        arguments: dict[str, Argument],
    ) -> None:
        arguments = taken(source, kernel, arguments)
        of_call = {name: described(a) for name, a in arguments.items()}
        launches.append(Launch(source.name, source.macros, kernel, shape, of_call))
        copies = dict(within_pages(arguments))
        call(self, source, kernel, shape, copies)
        for name, copy in copies.items():
            original = arguments[name]
            if isinstance(original, Tensor) and isinstance(copy, Tensor):
                original.copy_(copy)

    def noted_read(self: EmulatedDevice, value: Tensor) -> Callable[[], int]:
        reads.integers.append(int(value))
        return read(self, value)

    def noted_list(self: Tensor) -> Any:
        table = tolist(self)
        reads.tables.append(list(table))
        return table

    backend = emulated_backend()
    with (
        patch.object(CudaDevice, "call", noted),
        patch.object(EmulatedDevice, "read", noted_read),
        patch.object(Tensor, "tolist", noted_list),
        patch.dict(backends.BACKENDS, cpu=lambda device: backend),
    ):
        yield


@contextmanager
def gpu(launches: list[Launch], reads: Any, case: Case) -> Iterator[None]:
    """Calls on CUDA tensors are noted, and checked by the driver's stand-in."""
    from fake_cuda.gpu import DEVICE, CheckingDriver, address, fake_gpu

    call = CudaDevice.call
    expected: list[bytes] = []

    def packed(argument: Argument) -> bytes:
        if isinstance(argument, float):
            return struct.pack("=d", argument)
        number = address(argument) if isinstance(argument, Tensor) else argument or 0
        return struct.pack("=q", number)

    def noted(
        self: CudaDevice,
        source: KernelSource,
        kernel: str,
        shape: Shape,
        arguments: dict[str, Argument],
    ) -> None:
        arguments = taken(source, kernel, arguments)
        assert all(a.device == DEVICE for a in arguments.values() if isinstance(a, Tensor))
        of_call = {name: described(a) for name, a in arguments.items()}
        launches.append(Launch(source.name, source.macros, kernel, shape, of_call))
        expected[:] = map(packed, arguments.values())
        call(self, source, kernel, shape, arguments)

    def check(driver: CheckingDriver) -> None:
        assert driver.arguments == expected

    backend = CudaBackend(CudaDevice(DEVICE))
    with (
        fake_gpu(reads, case.capability, GPUS[case.capability] * 1024, check),
        patch.object(CudaDevice, "call", noted),
        patch.dict(backends.BACKENDS, cuda=lambda device: backend),
    ):
        yield


@contextmanager
def two_ranks() -> Iterator[None]:
    """This process is the second rank of two, and what the other sends is the same."""

    def gather(parts: list[Tensor], part: Tensor, group: object) -> None:
        for gathered in parts:
            gathered.copy_(part)

    functions: dict[str, Any] = {
        "get_world_size": lambda group: 2,
        "get_rank": lambda group: 1,
        "all_gather": gather,
        "all_reduce": lambda tensor, group: tensor.mul_(2),
        "broadcast": lambda tensor, group, group_src: None,
    }
    with (
        patch.multiple(shards.dist, **functions),
        patch.object(task, "process_group_named", lambda name: None),
    ):
        yield


def problem_of(case: Case) -> dict[str, Tensor | None]:
    """Tensors of the case's call by the names of their arguments."""
    sizes = {"batch": 5, "frames": 9, "labels": 6, "joint_dim": 20, "vocab_size": 37}
    problem = random_joint(dtype=case.dtype, **sizes | case.sizes)
    tensors: dict[str, Tensor | None] = {
        "encoder": problem.encoder,
        "predictor": problem.predictor,
        "weight": problem.weight,
        "bias": problem.bias,
        "targets": problem.targets.clamp(1, 5),
        "encoder_lengths": problem.encoder_lengths,
        "target_lengths": problem.target_lengths,
    }
    if case.is_additive:
        tensors |= {"weight": None, "bias": None}
    if case.function == "given":
        encoder, predictor = tensors.pop("encoder"), tensors.pop("predictor")
        tensors["logits"] = encoder.unsqueeze(2) + predictor.unsqueeze(1)
        tensors["logit_lengths"] = tensors.pop("encoder_lengths")
        del tensors["weight"], tensors["bias"]
    if case.is_restricted:
        ranges = torch.zeros(*problem.encoder.shape[:2], 2, dtype=torch.int64)
        ranges[..., 1] = problem.predictor.shape[1]
        ranges[:, 1:-2, 1] -= 1
        tensors["label_ranges"] = ranges
    return tensors


MAY_STAY = ("encoder_lengths", "logit_lengths", "target_lengths", "label_ranges")


def run(case: Case, problem: dict[str, Tensor | None], move: Callable[[Tensor], Tensor]) -> None:
    """The case's call, and the backward pass of what it returns."""
    tensors = dict(problem)
    for name, tensor in problem.items():
        if tensor is not None:
            stays = name in MAY_STAY and case.lengths_on == "host"
            leaf = tensor.detach().requires_grad_(tensor.requires_grad and name in case.wants)
            tensors[name] = leaf if stays else move(leaf)
    options: dict[str, Any] = {"blank": 0, "topology": case.topology, **case.options}
    if case.is_shared:
        options["process_group"] = SimpleNamespace(group_name="two")
    lengths = tensors.get("encoder_lengths"), tensors["target_lengths"]
    if case.function == "posteriors":
        rnnt_op.pruned_ranges(rnnt_op.posteriors(**tensors, **options), *lengths, 3)
        return
    if case.function == "align":
        frames = rnnt_op.align(**tensors, **options).frames
        rnnt_op.alignment_ranges(frames, *lengths, max_frames=9, early=1, late=2)
        return
    device = tensors["targets"].device.type
    function = rnnt_op.rnnt_loss if case.function == "given" else rnnt_op.joint_rnnt_loss
    with autocast(device, case.autocast):
        loss = function(**tensors, **options)
    if loss.requires_grad:
        backward(loss)


@contextmanager
def autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """As ``torch.autocast``, which does nothing where no GPU is."""
    before = torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype is not None)
    torch.set_autocast_dtype(device, dtype or before)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, before)


def backward(loss: Tensor) -> None:
    """Calls the op's backward: autograd's engine would ask for the gradient's device."""
    node: Any = loss.grad_fn
    with torch.no_grad():
        node._forward_cls.backward(node, torch.ones_like(loss))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_launches_are_those_of_the_emulator(case: Case) -> None:
    from fake_cuda.gpu import HostReads, on_gpu

    reads, expected, launched = HostReads(), [], []
    problem = problem_of(case)
    with two_ranks(), emulation(expected, reads):
        run(case, problem, lambda tensor: tensor)
    with two_ranks(), gpu(launched, reads, case):
        run(case, problem, on_gpu)
    assert expected
    assert launched == expected
    assert not any((reads.integers, reads.tables)), "read on a CPU alone"


def test_what_does_not_fit_is_refused() -> None:
    from fake_cuda.gpu import DEVICE, HostReads, LaunchError, fake_gpu

    def launch(threads: int = 128, shared_bytes: int = 0, **others: Tensor) -> None:
        names = ("frame_sample", "frame_node", "low", "high", "first_state")
        arguments: dict[str, Argument] = {
            **{name: torch.empty(1, dtype=torch.int64, device=DEVICE) for name in names},
            **{n: torch.empty(1, dtype=torch.int32, device=DEVICE) for n in ("frame", "state")},
            **others,
        }
        module.launch("node_rows", (1, 1, 1), (threads, 1, 1), arguments, shared_bytes)

    with fake_gpu(HostReads(), (8, 0), GPUS[8, 0] * 1024, lambda driver: None):
        module = load_module(CUDA.node_rows(), DEVICE)
        launch(shared_bytes=100_000)
        with pytest.raises(LaunchError, match="129 threads, bound 128"):
            launch(threads=129)
        with pytest.raises(DriverError, match="200000 bytes of dynamic shared memory"):
            launch(shared_bytes=200_000)
        with pytest.raises(ArgumentError, match=r"expected low as a tensor on cuda:0, got one on"):
            launch(low=torch.empty(1, dtype=torch.int64, device="cpu"))
        with pytest.raises(DriverError, match="NOT_FOUND"):
            module.launch("another", (1, 1, 1), (1, 1, 1), [])
        with pytest.raises(LaunchError, match="waits for the device"):
            torch.ones(3, device="cpu").to(DEVICE)
        with pytest.raises(LaunchError, match="waits for the device"):
            torch.ones(3, 2, device=DEVICE)[:, [1]]
        with pytest.raises(DataDependentOutputException):
            int(torch.ones(3, device=DEVICE).sum())


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90a", "sm_120"])
def test_cubins_say_what_ptxas_says(architecture: str) -> None:
    from cubin import kernels_of

    source = CUDA.selection(RNNT)
    compiled = build(source, CudaCompiler(architecture)).compiled
    kernels = kernels_of(compiled.binary)
    listed = {usage.kernel: usage.registers for usage in usages(compiled.log)}
    assert {name: kernel.registers for name, kernel in kernels.items()} == listed
    for name, signature in signatures(source).items():
        offsets = range(0, 8 * len(signature.parameters), 8)
        assert kernels[name].parameters == tuple((offset, 8) for offset in offsets)
