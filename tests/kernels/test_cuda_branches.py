"""What only a CUDA tensor reaches, each with what proves it where there is no GPU."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from problems import random_joint
from torch import Tensor
from torch.overrides import TorchFunctionMode

import rnnt_op
from rnnt_op import backends, batch, shards, task, torch_private, transfer
from rnnt_op.backends.cuda_device import CudaDevice, has_wide_results
from rnnt_op.backends.native import NativeBackend
from rnnt_op.batch import Batch, read_batch

PACKAGE = [*ROOT.glob("rnnt_op/**/*.py"), *ROOT.glob("torch_library_registration/*.py")]
TOOLS = ("tools", "doctor.py")  # they look for a GPU to report it

COVERED = {
    "backends/__init__.py:": "BACKENDS: the emulator takes the place of 'cpu' in it",
    "backends/__init__.py:_cuda": "tests/jit/test_first_use.py, for AMD's; a GPU's is its last line",
    "backends/cuda_device.py:guard": "tests/kernels/test_gpu.py only, on a GPU; its order is tested here",
    "backends/cuda_device.py:has_wide_results": "here",
    "backends/cuda_device.py:_capability": "here, with another capability",
    "backends/cuda_device.py:read": "tests/kernels/test_gpu.py only, on a GPU",
    "jit/cuda_module.py:__enter__": "tests/jit/test_jit_module.py, with a fake driver",
    "jit/cuda_module.py:load_module": "tests/jit/test_jit_module.py, with a fake driver",
    "jit/cuda_module.py:_load": "tests/jit/test_jit_module.py, with a fake driver",
    "precompile.py:_visible_architectures": "tests/jit/test_jit_tools.py, with other capabilities",
    "integrations/nemo_joint.py:joint_network": (
        "tests/integrations/test_integrations_nemo_joint.py: as with log_softmax=False"
    ),
    "shards.py:check_batch": "here",
    "transfer.py:to_device": "here",
    "batch.py:read_batch": "here",
}


def is_of_cuda(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return node.value == "cuda"
    text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
    return text.startswith(("torch.cuda.", "torch.version.hip", "torch.backends.cuda")) or (
        text.endswith((".is_cuda", ".pin_memory"))
    )


def functions_of(path: Path) -> Iterator[str]:
    """Innermost functions that ask for CUDA; the empty name is the module's."""

    def visit(node: ast.AST, function: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            name = child.name if isinstance(child, ast.FunctionDef) else function
            if is_of_cuda(child):
                yield name
            yield from visit(child, name)

    yield from visit(ast.parse(path.read_text()), "")


def test_every_branch_is_listed() -> None:
    found = set()
    for path in PACKAGE:
        name = path.relative_to(ROOT).as_posix().removeprefix("rnnt_op/")
        if not name.startswith(TOOLS):
            found |= {f"{name}:{function}" for function in functions_of(path)}
    assert found == set(COVERED)


class OnGpu(Tensor):
    """A tensor in the CPU's memory that says that it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


class Gpu(TorchFunctionMode):
    """Has what is asked for on a GPU made on the CPU, and notes copies that need not be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def moved(value: Any) -> Any:
            is_gpu = isinstance(value, torch.device) and value.type == "cuda"
            return torch.device("cpu") if is_gpu else value

        if function is Tensor.pin_memory:
            self.pinned += 1
            return args[0]
        args = tuple(map(moved, args))
        return function(*args, **{k: moved(v) for k, v in (kwargs or {}).items()})


def on_gpu(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnGpu)


@pytest.fixture
def asserted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, str]]:
    """What is asserted on the device."""
    found: list[tuple[bool, str]] = []
    for module in (batch, shards):
        monkeypatch.setattr(
            module,
            "assert_on_device",
            lambda condition, text: found.append((bool(condition), text)),
        )
    return found


@pytest.mark.parametrize("bad", [False, True])
def test_labels_on_a_gpu_are_checked_there(bad: bool, asserted: list[tuple[bool, str]]) -> None:
    """Lengths on the host: nothing waits for the device."""
    problem = random_joint(2, 4, 3, lengths=[(4, 3), (3, 2)])
    targets = problem.targets.clone()
    targets[0, 2] = 99 if bad else 1
    targets[1, 2] = -7  # padding
    with Gpu() as gpu:
        read = read_batch(
            on_gpu(targets),
            problem.encoder_lengths,
            problem.target_lengths,
            None,
            max_frames=4,
            tokens=11,
            blanks=(0,),
        )
    assert asserted == [(not bad, "targets: a label is not a token or equals blank")]
    assert (read.frames, read.labels) == ([4, 3], [3, 2])
    assert gpu.pinned == 1  # the lengths that labels are compared with


def test_lengths_on_a_gpu_come_with_the_verdict(asserted: list[tuple[bool, str]]) -> None:
    problem = random_joint(2, 4, 3, lengths=[(4, 3), (3, 2)])
    lengths = on_gpu(problem.encoder_lengths), on_gpu(problem.target_lengths)
    limits: dict[str, Any] = {"max_frames": 4, "tokens": 11, "blanks": (0,)}
    with Gpu():
        read = read_batch(on_gpu(problem.targets), *lengths, None, **limits)
        assert (list(read.frames), list(read.labels)) == ([4, 3], [3, 2])
        with pytest.raises(ValueError, match=r"targets: expected labels in \[0, 11\), got 99"):
            read_batch(on_gpu(torch.full_like(problem.targets, 99)), *lengths, None, **limits)
    assert asserted == []


@pytest.mark.parametrize("differ", [False, True])
def test_ranks_batches_on_a_gpu(
    differ: bool, asserted: list[tuple[bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_gather(digests: list[Tensor], digest: Tensor, group: object) -> None:
        for i, gathered in enumerate(digests):
            gathered.copy_(digest + (differ and i))

    monkeypatch.setattr(shards.dist, "all_gather", all_gather)
    monkeypatch.setattr(shards.dist, "get_world_size", lambda group: 2)
    targets = on_gpu(torch.ones(2, 3).long())
    shard = shards.Shard(None, 0, 6, 11)  # type: ignore[arg-type]
    with Gpu():
        shard.check_batch(Batch(targets, [4, 3], [3, 2], None, None))
    ((is_same, text),) = asserted
    assert is_same is not differ
    assert text.startswith("rnnt_op: ranks that share an output layer got different batches.")
    assert len(text) <= torch_private.ASSERTION_BYTES


def test_what_goes_to_a_gpu_is_pinned() -> None:
    with Gpu() as gpu:
        transfer.to_device(torch.ones(2), torch.device("cuda", 0))
        transfer.to_device(on_gpu(torch.ones(2)), torch.device("cuda", 0))
        transfer.to_device(torch.ones(2), torch.device("cpu"))
    assert gpu.pinned == 1


def test_the_device_is_guarded_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a capture, lengths on the GPU could not be read, and kernels not be loaded."""

    class Captured(NativeBackend):
        def guard(self, device: torch.device) -> AbstractContextManager[object]:
            @contextmanager
            def refuse() -> Iterator[None]:
                raise RuntimeError("cannot be captured")
                yield

            return refuse()

        def load(self, kernels: object) -> None:
            raise AssertionError("loaded")

    def read(*arguments: object, **options: object) -> None:
        raise AssertionError("read")

    monkeypatch.setitem(backends.BACKENDS, "cpu", lambda device: Captured())
    monkeypatch.setattr(task, "read_batch", read)
    arguments = [a.detach() for a in random_joint().arguments]
    logits = torch.randn(3, 7, 6, 11)
    for call in (
        lambda: rnnt_op.joint_rnnt_loss(*arguments),
        lambda: rnnt_op.posteriors(*arguments),
        lambda: rnnt_op.align(*arguments),
        lambda: rnnt_op.rnnt_loss(logits, *arguments[4:], blank=0),
    ):
        with pytest.raises(RuntimeError, match="cannot be captured"):
            call()


SETTINGS = torch.backends.cuda.matmul
BF16_SUM = "allow_bf16_reduced_precision_reduction"
FP16_SUM = "allow_fp16_reduced_precision_reduction"


@pytest.fixture
def settings() -> Iterator[Any]:
    names = ("allow_fp16_accumulation", BF16_SUM, FP16_SUM)
    before = {name: getattr(SETTINGS, name) for name in names}
    yield SETTINGS
    for name, value in before.items():
        setattr(SETTINGS, name, value)


def test_wide_results_of_half_operands(settings: Any) -> None:
    """As torch's cuBLAS calls allow them."""

    def allowed() -> list[bool]:
        return [
            has_wide_results(dtype, capability)
            for dtype in (torch.bfloat16, torch.float16)
            for capability in ((7, 5), (8, 0), (9, 0), (12, 1))
        ]

    assert allowed() == [False, True, True, True] + [True] * 4
    settings.allow_fp16_accumulation = True
    assert allowed() == [False, True, True, True] + [False] * 4
    settings.allow_fp16_accumulation = False
    for name in (BF16_SUM, FP16_SUM):
        setattr(settings, name, (False, False))
    assert allowed() == [False] * 8
    for name in (BF16_SUM, FP16_SUM):
        setattr(settings, name, (False, True))
    assert allowed() == [False, True, True, True] + [True] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_without_wide_results(
    dtype: torch.dtype, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.allow_fp16_accumulation = True
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    a, b = torch.randn(9, 33).to(dtype), torch.randn(33, 5).to(dtype)
    out = torch.empty(9, 5)
    CudaDevice(torch.device("cuda", 0)).matmul(a, b, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)
