"""What is private in torch is used in one place, and does what is written there."""

import ast
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from places import ROOT
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune

from rnnt_op import torch_private

SOURCES = sorted([*ROOT.glob("rnnt_op/**/*.py"), *ROOT.glob("torch_library_registration/*.py")])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in SOURCES}


def is_private(name: str) -> bool:
    return any(p.startswith("_") and not p.startswith("__") for p in name.split("."))


def private_names(tree: ast.Module) -> Iterator[str]:
    """Private names of torch's that a module imports or reads."""
    modules = {"torch"}  # names of the module's that are torch's
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            modules.update(alias.asname or alias.name for alias in node.names)
            yield from (
                name
                for name in (f"{node.module}.{alias.name}" for alias in node.names)
                if is_private(name)
            )
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    modules.add(alias.asname or "torch")
                    if is_private(alias.name):
                        yield alias.name
    for node in ast.walk(tree):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        is_dotted = name.replace(".", "").isidentifier()  # without a call in between
        if is_dotted and name.split(".")[0] in modules and is_private(name.partition(".")[2]):
            yield name


def test_private_names_are_in_one_place() -> None:
    found = {path: sorted(set(private_names(tree))) for path, tree in TREES.items()}
    assert [path for path, names in found.items() if names] == ["rnnt_op/torch_private.py"]


def test_the_search_for_private_names_finds_them() -> None:
    source = """
import torch._dynamo
import torch.distributed as dist
from torch._C import thing
from torch.autograd import forward_ad
forward_ad._level, torch.ops.a._b, dist.distributed_c10d._group, self._own, torch.__version__
"""
    assert sorted(set(private_names(ast.parse(source)))) == [
        "dist.distributed_c10d._group",
        "forward_ad._level",
        "torch._C.thing",
        "torch._dynamo",
        "torch.ops.a._b",
    ]


def test_transforms_are_active() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_private.transforms_are_active())
        return x.sum()

    function(torch.ones(2))
    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev):
        transform(function)(torch.ones(2))
    assert seen == [False, True, True, True]


class Doubled(torch.autograd.Function):
    """Stands for an op under a transform, and gives its derivative another value."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch_private.below_autograd():
            return torch.ops.rnnt_op_test.square(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 4 * x * gradient


@pytest.fixture
def square() -> Iterator[Any]:
    library = torch.library.Library("rnnt_op_test", "DEF")
    library.define("square(Tensor x) -> Tensor")
    library.impl("square", lambda x: x * x, "CompositeExplicitAutograd")
    for key in ("Autograd", torch_private.TRANSFORMS):
        library.impl("square", Doubled.apply, key)
    yield torch.ops.rnnt_op_test.square
    library._destroy()


def test_transforms_reach_a_function_through_the_dispatcher(square: Any) -> None:
    x = torch.tensor(3.0)
    assert torch.func.grad(square)(x) == 12
    assert torch.func.grad(lambda y: torch.func.grad(square)(y))(x) == 4


def test_below_autograd(square: Any) -> None:
    """Nothing is recorded there, and the op's own kernel runs."""
    x = torch.tensor(3.0, requires_grad=True)
    assert torch.autograd.grad(square(x), x)[0] == 12
    with torch_private.below_autograd():
        result = square(x)
    assert result == 9
    assert not result.requires_grad


def test_backward_keeps_graph() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = (x * x).sum()
    y.register_hook(lambda _: seen.append(torch_private.backward_keeps_graph()))
    torch.autograd.grad(y, x, retain_graph=True)
    torch.autograd.grad(y, x, create_graph=True)
    torch.autograd.grad(y, x)
    assert seen == [True, True, False]


def test_is_batched_gradient() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = (x * x).sum()
    y.register_hook(lambda g: seen.append(torch_private.is_batched_gradient(g)))
    torch.autograd.grad(y, x, torch.ones(3), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x)
    assert seen == [True, False]


def test_assert_on_device() -> None:
    torch_private.assert_on_device(torch.tensor(True), "words")
    with pytest.raises(RuntimeError, match="words"):
        torch_private.assert_on_device(torch.tensor(False), "words")


def test_process_group_named(tmp_path: Path) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        group = dist.group.WORLD
        assert torch_private.process_group_named(group.group_name) is group
    finally:
        dist.destroy_process_group()


def test_hooks_of_a_call() -> None:
    """Each that torch lets a module be given is found, and none of another module."""
    registrations = {
        "register_forward_pre_hook": lambda module, inputs: None,
        "register_forward_hook": lambda module, inputs, output: None,
        "register_full_backward_pre_hook": lambda module, gradients: None,
        "register_full_backward_hook": lambda module, inputs, outputs: None,
    }
    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert torch_private.call_hooks(layer) == []
    for number, (register, hook) in enumerate(registrations.items(), 1):
        getattr(layer, register)(hook)
        assert hook in torch_private.call_hooks(layer)
        assert (hook in torch_private.hooks_behind_forward(layer)) == (number > 1)
    assert len(torch_private.call_hooks(layer)) == 4
    assert torch_private.call_hooks(other) == []


def test_weight_hooks() -> None:
    layer = prune.l1_unstructured(torch.nn.Linear(2, 2), "weight", 0.5)
    layer.register_forward_pre_hook(lambda module, inputs: None)
    assert [type(hook).__name__ for hook in torch_private.weight_hooks(layer)] == ["L1Unstructured"]


def test_is_fake() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_private.is_fake(x))
        return x + 1

    function(torch.ones(2))
    make_fx(function, tracing_mode="fake")(torch.ones(2))
    torch.func.functionalize(function)(torch.ones(2))
    assert not torch_private.is_fake(torch.nn.Parameter(torch.ones(2)))
    assert seen == [False, True, False]


LAYOUTS = {
    "plain": lambda t: t,
    "gaps": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand_as(t),
    "reversed gaps": lambda t: torch.stack([torch.full_like(t, float("nan")), t], -1)[..., 1],
}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_onednn_linear(layout: str) -> None:
    assert torch_private.has_onednn_linear()
    strided = LAYOUTS[layout]
    x, weight = strided(torch.randn(5, 3)), strided(torch.randn(4, 3))
    expected = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(torch_private.onednn_linear(x, weight), expected)


NEEDS_MKL = pytest.mark.skipif(
    not torch_private.has_mkl_bfloat16_gemm(), reason="torch without MKL, or an older one"
)


def test_torch_with_mkl_has_its_bfloat16_gemm() -> None:
    """Since MKL 2020.3; torch's builds for other processors have another BLAS."""
    if torch.backends.mkl.is_available() and sys.platform == "linux":
        assert torch_private.has_mkl_bfloat16_gemm()


PITCHED = {
    "plain": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "part of wider rows": lambda t: torch.cat((t, torch.full_like(t, float("nan"))), 1)[
        :, : t.shape[1]
    ],
    "transposed part": lambda t: (
        torch.cat((t, torch.full_like(t, float("nan")))).t().contiguous().t()[: len(t)]
    ),
}


@NEEDS_MKL
@pytest.mark.parametrize("layouts", list(itertools.product(PITCHED, repeat=2)), ids=" times ".join)
@pytest.mark.parametrize("sizes", [(5, 3, 4), (1, 1, 1), (1, 7, 5), (6, 1, 2), (70, 129, 33)])
def test_mkl_bfloat16_gemm(sizes: tuple[int, int, int], layouts: tuple[str, str]) -> None:
    m, k, n = sizes
    a = PITCHED[layouts[0]](torch.randn(m, k).bfloat16())
    b = PITCHED[layouts[1]](torch.randn(k, n).bfloat16())
    expected = a.double() @ b.double()
    out = torch.full((m, n), float("nan"))  # must not be read
    torch_private.mkl_bfloat16_gemm(a, b, out, add=False)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-5)
    torch_private.mkl_bfloat16_gemm(a, b, out, add=True)
    torch.testing.assert_close(out.double(), 2 * expected, rtol=1e-6, atol=2e-5)


@NEEDS_MKL
@pytest.mark.parametrize("sizes", [(0, 3, 4), (5, 0, 4), (5, 3, 0)])
def test_mkl_bfloat16_gemm_of_nothing(sizes: tuple[int, int, int]) -> None:
    m, k, n = sizes
    a, b, out = torch.ones(m, k).bfloat16(), torch.ones(k, n).bfloat16(), torch.ones(m, n)
    torch_private.mkl_bfloat16_gemm(a, b, out, add=True)
    assert (out == 1).all()
    torch_private.mkl_bfloat16_gemm(a, b, out, add=False)
    assert (out == 0).all()


@NEEDS_MKL
def test_mkl_bfloat16_gemm_of_what_a_blas_cannot_read() -> None:
    a, out = torch.ones(4, 4).bfloat16(), torch.zeros(4, 4)
    gaps = LAYOUTS["gaps"](a)
    with pytest.raises(AssertionError):
        torch_private.mkl_bfloat16_gemm(gaps, a, out, add=False)
    with pytest.raises(AssertionError):
        torch_private.mkl_bfloat16_gemm(a, a, LAYOUTS["gaps"](out), add=False)
    with pytest.raises(AssertionError):
        torch_private.mkl_bfloat16_gemm(a.float(), a, out, add=False)
    with pytest.raises(AssertionError):
        torch_private.mkl_bfloat16_gemm(a, a.to("meta"), out, add=False)


def texts(call: ast.Call, tree: ast.Module) -> list[str]:
    """The messages that a call may pass: a literal, or what its name is set to in the module."""
    message = call.args[1]
    if isinstance(message, ast.Name):
        return [
            ast.literal_eval(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == message.id
        ]
    return [ast.literal_eval(message)]


def test_messages_of_device_assertions_fit() -> None:
    """CUDA refuses longer ones, so the assertion itself would fail, and always."""
    messages = [
        text
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "assert_on_device"
        for text in texts(node, tree)
    ]
    assert len(messages) == 5
    assert [m for m in messages if len(m.encode()) > torch_private.ASSERTION_BYTES] == []
