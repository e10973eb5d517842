"""An output layer whose rows are spread over two ranks, against the whole one."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from lattices import (
    HAT,
    MULTI_BLANK,
    PLACED_MULTI_BLANK,
    REGULAR,
    TDT,
    VARIANTS,
    Variant,
    problem_of,
)
from problems import JointProblem, loss_and_gradients, random_joint, relative_error
from ranks import Ranks
from tested_backends import EAGER, EMULATOR, NATIVE, NEEDS_CXX, serve_cpu
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import rnnt_op
from rnnt_op import plan
from rnnt_op.backends import backend_for

LENGTHS = ((4, 2), (3, 3), (2, 0), (6, 2), (1, 1), (2, 3))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()


def on_backend(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a rank runs: a function, while that backend serves the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        serve_cpu(patch, name)
        return function(*arguments)


def shared(problem: JointProblem, how: str) -> tuple[JointProblem, dict[str, Any], slice]:
    """The problem with this rank's part of the output layer, what tells the loss, and its rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = -(-len(problem.weight) // size)
    mine = slice(rank * rows, (rank + 1) * rows)
    layer = (problem.weight.detach(), None if problem.bias is None else problem.bias.detach())
    if how == "group":
        parts = [None if t is None else t[mine].clone().requires_grad_() for t in layer]
        options = {"process_group": dist.group.WORLD}
    else:
        mesh = init_device_mesh("cpu", (size,))
        parts = [
            None if t is None else distribute_tensor(t, mesh, [Shard(0)]).requires_grad_()
            for t in layer
        ]
        options = {}
    return replace(problem, weight=parts[0], bias=parts[1]), options, mine


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def errors(problem: JointProblem, how: str, options: dict[str, Any]) -> tuple[float, float]:
    """Of the loss and the gradients of this rank, relative to those of the whole."""
    torch.manual_seed(7)
    expected, whole = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, **options)
    part, ranks_options, mine = shared(problem, how)
    torch.manual_seed(7)
    loss, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, part, **options, **ranks_options)
    expected_gradients = [*whole[:2], *(gradient[mine] for gradient in whole[2:])]
    assert [local(g).shape for g in gradients] == [g.shape for g in expected_gradients]
    assert [g.dtype for g in gradients] == [g.dtype for g in whole]
    finite = expected.isfinite()
    assert torch.equal(loss.isfinite(), finite)
    return (
        relative_error([loss[finite]], [expected[finite]]),
        relative_error(list(map(local, gradients)), expected_gradients),
    )


def of_variant(variant: Variant, how: str) -> tuple[float, float]:
    options = {"gradient_tolerance": 0.0, "zero_infinity": True, "reduction": "none"}
    return errors(problem_of(variant, LENGTHS), how, {**variant.options, **options})


LATTICES = [
    *((number, "dtensor") for number in range(len(VARIANTS))),
    # Ranks of a plain group have as many rows each.
    *((VARIANTS.index(even), "group") for even in (MULTI_BLANK, PLACED_MULTI_BLANK)),
]
# A part of the vocabulary is of a symbol's columns, which these have all kinds of.
OF_KERNELS = [VARIANTS.index(variant) for variant in (REGULAR, MULTI_BLANK, TDT, HAT[0])]


@pytest.mark.parametrize(
    ("backend", "variant", "how"),
    [
        pytest.param(
            *backend.values,
            number,
            how,
            marks=backend.marks,
            id=f"{backend.id}-{VARIANTS[number]}-{how}",
        )
        for backend in (NATIVE, EAGER, EMULATOR)
        for number, how in LATTICES
        if backend is EAGER or number in OF_KERNELS
    ],
)
def test_every_lattice(ranks: Ranks, backend: str, variant: int, how: str) -> None:
    for loss, gradients in ranks.run(on_backend, backend, of_variant_number, variant, how):
        assert loss <= 1e-13
        assert gradients <= 1e-12


def of_variant_number(number: int, how: str) -> tuple[float, float]:
    return of_variant(VARIANTS[number], how)


def of_random(dtype: torch.dtype, how: str, options: dict[str, Any]) -> tuple[float, float]:
    torch.manual_seed(3)
    return errors(random_joint(4, 40, 12, 24, 50, dtype=dtype), how, options)


@pytest.mark.parametrize("backend", [NATIVE, EAGER, EMULATOR])
@pytest.mark.parametrize(("how", "reduction"), [("group", "mean"), ("dtensor", "none")])
@pytest.mark.parametrize(
    ("dtype", "bar"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_dtypes(
    ranks: Ranks, backend: str, how: str, reduction: str, dtype: torch.dtype, bar: float
) -> None:
    options = {"reduction": reduction, "workspace_bytes": 100_000}
    for loss, gradients in ranks.run(on_backend, backend, of_random, dtype, how, options):
        assert loss <= bar
        assert gradients <= bar


@pytest.mark.parametrize("backend", [NATIVE, EAGER, EMULATOR])
@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.4}, {"clamp": 0.01}, {"fast_emit": 0.3, "delay_penalty": 0.1}],
    ids=lambda options: "-".join(options),
)
def test_options(ranks: Ranks, backend: str, options: dict[str, Any]) -> None:
    for found in ranks.run(on_backend, backend, of_random, torch.float64, "dtensor", options):
        assert max(found) <= 1e-12


def on_lattice() -> float:
    torch.manual_seed(1)
    problem = random_joint(3, 9, 5, 8, 13)
    part, options, _ = shared(problem, "dtensor")
    ranges = torch.tensor([0, 9]).expand(3, 9, 2)
    worst = 0.0
    with torch.no_grad():
        for function in (rnnt_op.posteriors, rnnt_op.align):
            found = function(*part.arguments, label_ranges=ranges, **options)
            expected = function(*problem.arguments, label_ranges=ranges)
            for one, other in zip(found, expected, strict=True):
                worst = max(worst, float((one - other).abs().max()))
    return worst


def test_posteriors_and_alignments(ranks: Ranks) -> None:
    assert max(ranks.run(on_lattice)) <= 1e-12


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.predictor = nn.Embedding(12, 8)
        self.loss = rnnt_op.JointRNNTLoss(8, 13, encoder_dim=6, dropout=0.2)

    def forward(self, features: Tensor, targets: Tensor, *lengths: Tensor) -> Tensor:
        states = self.predictor(nn.functional.pad(targets, (1, 0)))
        return self.loss(features, states, targets, *lengths)


def module_errors(compiled: bool, checkpointed: bool) -> tuple[float, float, int]:
    torch.manual_seed(5)
    model = Model()
    arguments = (
        torch.randn(3, 9, 6),
        torch.randint(1, 12, (3, 4)),
        torch.tensor([9, 7, 3]),
        torch.tensor([4, 4, 0]),
    )

    def step(run: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(6)
        loss = run(*arguments)
        return loss, list(torch.autograd.grad(loss, list(model.parameters())))

    loss, whole = step(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("weight", "bias"):
        distributed = distribute_tensor(getattr(model.loss, name).detach(), mesh, [Shard(0)])
        setattr(model.loss, name, nn.Parameter(distributed))
    run: Callable[..., Tensor] = model
    if compiled:
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
    if checkpointed:
        run = functools.partial(checkpoint, run, use_reentrant=False)
    part, gradients = step(run)
    rows = model.loss.weight.to_local().shape[0]
    first = 0 if dist.get_rank() == 0 else 7
    mine = [g[first : first + rows] if len(g) == 13 else g for g in whole]
    logits = model.loss.logits(torch.zeros(2, 6), torch.zeros(2, 8))
    assert logits.shape == (2, 13)
    return (
        relative_error([part.detach()], [loss.detach()]),
        relative_error(list(map(local, gradients)), mine),
        rows,
    )


@pytest.mark.parametrize(
    ("compiled", "checkpointed"),
    [
        (False, False),
        (False, True),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
    ids=["eager-plain", "eager-checkpointed", "compiled-checkpointed"],
)
def test_module(ranks: Ranks, compiled: bool, checkpointed: bool) -> None:
    found = ranks.run(module_errors, compiled, checkpointed)
    assert [rows for *_, rows in found] == [7, 6]  # half of the weight's memory on each
    for loss, gradients, _ in found:
        assert loss <= 1e-6
        assert gradients <= 1e-6


def different_batches(labels: int) -> str:
    """What FSDP2's parameters would do if another module read them: shards, and a batch a rank."""
    torch.manual_seed(0)
    problem = random_joint(2, 5, 3, lengths=[(5, 3), (4, 2)])
    part, _, _ = shared(problem, "dtensor")
    if dist.get_rank() == 1:
        part.targets[1, labels] = 1 + part.targets[1, labels] % 10
    try:
        rnnt_op.joint_rnnt_loss(*part.arguments)
    except ValueError as error:
        return str(error)
    return "none"


def test_different_batches_are_refused(ranks: Ranks) -> None:
    one, other = ranks.run(different_batches, 1)
    assert one == other
    assert_expected_inline(
        one,
        """rnnt_op: ranks that share an output layer got different batches. All take the same inputs. If FSDP2 shards the layer, call the loss in the forward of the module that owns it, or name its method to register_fsdp_forward_method""",
    )
    assert ranks.run(different_batches, 2) == ["none", "none"]  # padding may differ


def wrong_layers() -> list[str]:
    problem = random_joint(2, 5, 3)
    mesh = init_device_mesh("cpu", (2,))
    whole = distribute_tensor(problem.weight.detach(), mesh, [Replicate()])
    rows = distribute_tensor(problem.weight.detach(), mesh, [Shard(0)])
    columns = distribute_tensor(problem.weight.detach(), mesh, [Shard(1)])
    encoder = distribute_tensor(problem.encoder.detach(), mesh, [Replicate()])

    def error_of(**changes: Any) -> str:
        with pytest.raises(TypeError) as error:
            rnnt_op.joint_rnnt_loss(*replace(problem, **changes).arguments)
        return str(error.value)

    return [
        error_of(weight=whole, bias=None),
        error_of(weight=columns, bias=None),
        error_of(weight=rows),
        error_of(encoder=encoder),
    ]


def test_wrong_layers(ranks: Ranks) -> None:
    messages, others = ranks.run(wrong_layers)
    assert messages == others
    assert_expected_inline(
        "\n".join(messages),
        """\
weight: expected a DTensor with placement Shard(0) on a mesh of one dimension, got (Replicate(),) on one of 1; redistribute it, or take the whole with .full_tensor()
weight: expected a DTensor with placement Shard(0) on a mesh of one dimension, got (Shard(dim=1),) on one of 1; redistribute it, or take the whole with .full_tensor()
bias: expected a DTensor, as weight is, got a plain tensor; distribute it with placement Shard(0), too
encoder: expected a whole local tensor, got a DTensor; only weight and bias may be sharded, by rows. If FSDP2 shards the output layer, let the module that owns it call the loss in its forward, as rnnt_op.JointRNNTLoss does, or name the method that reads the weight to torch.distributed.fsdp.register_fsdp_forward_method. Otherwise gather the tensor with .full_tensor(), or take this rank's part with .to_local()""",
    )


def of_logits_of_different_sizes(workspace_bytes: int) -> tuple[float, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MOST_KEPT_BYTES", 0)
        patch.setattr(plan, "_LEAST_PARTS", 1)
        patch.setattr(plan, "_MIN_CACHED_ROWS", 1)
        patch.setattr(backend_for(torch.device("cpu")), "CACHE_BYTES", 0)
        problem = random_joint(6, 12, 5, vocab_size=67, lengths=6 * [(12, 5)])
        options = {"gradient_tolerance": 0.0, "workspace_bytes": workspace_bytes}
        return errors(problem, "dtensor", {**options, "reduction": "sum"})


@NEEDS_CXX
def test_ranks_compute_the_same_groups(ranks: Ranks) -> None:
    """Even where one of them has room for the logits of a larger part of a group."""
    for loss, gradients in ranks.run(of_logits_of_different_sizes, 52_000):
        assert max(loss, gradients) <= 1e-12
