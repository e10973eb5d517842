"""Under tracers: schemas, fake kernels, one node in the graph, no recompilation."""

import textwrap

import pytest
import torch
from expecttest import assert_expected_inline
from problems import (
    check_op,
    joint_arguments,
    logits_arguments,
    loss_and_gradients,
    network_arguments,
    random_joint,
)
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs

import rnnt_op

OPS = (
    "joint_loss",
    "joint_loss_backward",
    "joint_loss_with_grads",
    "logits_loss",
    "logits_loss_backward",
    "posteriors",
    "align",
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_schemas() -> None:
    schemas = [textwrap.fill(str(getattr(torch.ops.rnnt_op, op).default._schema), 96) for op in OPS]
    assert_expected_inline(
        "\n".join(schemas),
        """\
rnnt_op::joint_loss(Tensor encoder, Tensor predictor, Tensor? weight, Tensor? bias, Tensor
targets, Tensor encoder_lengths, Tensor target_lengths, Tensor? label_ranges, int blank, str
topology, str normalizer, float delay_penalty, str activation, int? workspace_bytes, ScalarType
compute_dtype, str process_group, int first_column, int all_columns, float fast_emit, float
clamp, float dropout, Tensor? dropout_seed, float? gradient_tolerance, bool zero_infinity) ->
Tensor losses
rnnt_op::joint_loss_backward(Tensor d_losses, Tensor encoder, Tensor predictor, Tensor? weight,
Tensor? bias, Tensor targets, Tensor encoder_lengths, Tensor target_lengths, Tensor?
label_ranges, int blank, str topology, str normalizer, float delay_penalty, str activation, int?
workspace_bytes, ScalarType compute_dtype, str process_group, int first_column, int all_columns,
float fast_emit, float clamp, float dropout, Tensor? dropout_seed, float? gradient_tolerance,
bool zero_infinity, bool[4] wanted) -> (Tensor d_encoder, Tensor d_predictor, Tensor d_weight,
Tensor d_bias)
rnnt_op::joint_loss_with_grads(Tensor loss_weights, Tensor encoder, Tensor predictor, Tensor?
weight, Tensor? bias, Tensor targets, Tensor encoder_lengths, Tensor target_lengths, Tensor?
label_ranges, int blank, str topology, str normalizer, float delay_penalty, str activation, int?
workspace_bytes, ScalarType compute_dtype, str process_group, int first_column, int all_columns,
float fast_emit, float clamp, float dropout, Tensor? dropout_seed, float? gradient_tolerance,
bool zero_infinity, bool[4] wanted) -> (Tensor loss, Tensor d_encoder, Tensor d_predictor,
Tensor d_weight, Tensor d_bias)
rnnt_op::logits_loss(Tensor logits, Tensor targets, Tensor logit_lengths, Tensor target_lengths,
Tensor? label_ranges, int blank, str topology, str normalizer, float delay_penalty, float
fast_emit, float clamp, bool fused_log_softmax, bool zero_infinity, int? workspace_bytes, bool
keeps_scores) -> (Tensor losses, Tensor scores)
rnnt_op::logits_loss_backward(Tensor d_losses, Tensor scores, Tensor logits, Tensor targets,
Tensor logit_lengths, Tensor target_lengths, Tensor? label_ranges, int blank, str topology, str
normalizer, float delay_penalty, float fast_emit, float clamp, bool fused_log_softmax, bool
zero_infinity, int? workspace_bytes) -> Tensor d_logits
rnnt_op::posteriors(Tensor encoder, Tensor predictor, Tensor? weight, Tensor? bias, Tensor
targets, Tensor encoder_lengths, Tensor target_lengths, Tensor? label_ranges, int blank, str
topology, str normalizer, float delay_penalty, str activation, int? workspace_bytes, ScalarType
compute_dtype, str process_group, int first_column, int all_columns) -> (Tensor occupancies,
Tensor log_likelihoods)
rnnt_op::align(Tensor encoder, Tensor predictor, Tensor? weight, Tensor? bias, Tensor targets,
Tensor encoder_lengths, Tensor target_lengths, Tensor? label_ranges, int blank, str topology,
str normalizer, float delay_penalty, str activation, int? workspace_bytes, ScalarType
compute_dtype, str process_group, int first_column, int all_columns) -> (Tensor frames, Tensor
log_probabilities)""",
    )


def samples(op: str):
    """Arguments over layouts, dtypes and empty targets, with and without a need for gradients."""
    for dtype, labels, permuted, requires_grad, bias, restricted, dropout in (
        (torch.float64, 4, False, True, True, False, 0.0),
        (torch.float32, 4, True, True, True, True, 0.3),
        (torch.bfloat16, 4, False, False, False, True, 0.0),
        (torch.float32, 0, False, True, False, False, 0.5),
        (torch.float64, 0, True, False, True, True, 0.0),
    ):
        problem = random_joint(3, 5, labels, dtype=dtype, bias=bias)
        is_joint = not op.startswith("logits")
        if is_joint:
            tensors = problem.arguments[:4]
        else:
            tensors = (torch.randn(3, 5, labels + 1, 11).to(dtype),)
        tensors = tuple(
            None if t is None else (t.mT.contiguous().mT if permuted and t.dim() > 1 else t)
            for t in tensors
        )
        differentiable = op in ("joint_loss", "joint_loss_with_grads", "logits_loss")
        needs = requires_grad and differentiable
        tensors = tuple(None if t is None else t.detach().requires_grad_(needs) for t in tensors)
        d_losses = torch.rand(3, dtype=torch.promote_types(dtype, torch.float32))
        ranges = torch.tensor([0, labels + 1]).expand(3, 5, 2) if restricted else None
        tensors = (*tensors, *problem.arguments[4:])
        if op in ("posteriors", "align"):
            record = network_arguments(tensors, label_ranges=ranges)
        elif is_joint:
            record = joint_arguments(
                tensors,
                label_ranges=ranges,
                clamp=0.5,
                dropout=dropout,
                dropout_seed=torch.tensor([7]) if dropout else None,
                gradient_tolerance=1e-6,
            )
        else:
            record = logits_arguments(
                tensors, label_ranges=ranges, clamp=0.5, workspace_bytes=10_000
            )
        arguments = record.values()
        if op in ("joint_loss_backward", "joint_loss_with_grads"):
            arguments = (d_losses, *arguments, [True, False, True, bias])
        elif op == "logits_loss":
            arguments = (*arguments, requires_grad)
        elif op == "logits_loss_backward":
            _, scores = torch.ops.rnnt_op.logits_loss(*arguments, requires_grad)
            arguments = (d_losses, scores, *arguments)
        yield arguments


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    # opcheck compares runs of the op, which deterministic filling does not change.
    for arguments in samples(op):
        check_op(op, arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_compilation_over_many_shapes(reduction: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rnnt_op.joint_rnnt_loss, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((3, 7, 5), (2, 9, 4), (5, 4, 6), (4, 30, 2), (7, 3, 3)):
        problem = random_joint(*shape)
        expected = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, reduction=reduction)
        actual = loss_and_gradients(compiled, problem, reduction=reduction)
        assert torch.equal(actual[0], expected[0])
        assert all(torch.equal(a, e) for a, e in zip(actual[1], expected[1], strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("shape", [(1, 1, 0), (1, 5, 3), (3, 4, 0), (2, 1, 1)])
def test_compiled_at_sizes_zero_and_one(shape: tuple[int, int, int]) -> None:
    compiled = torch.compile(
        rnnt_op.joint_rnnt_loss, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    problem = random_joint(*shape)
    expected = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    actual = loss_and_gradients(compiled, problem)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(a, e) for a, e in zip(actual[1], expected[1], strict=True))


def test_compiled_logits_loss() -> None:
    compiled = torch.compile(rnnt_op.rnnt_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 7, 5), (2, 9, 4)):
        arguments = random_joint(*shape).arguments[4:]
        logits = torch.randn(shape[0], shape[1], shape[2] + 1, 11, requires_grad=True)
        results = []
        for function in (compiled, rnnt_op.rnnt_loss):
            loss = function(logits, *arguments, blank=0, clamp=0.1)
            results.append((loss, *torch.autograd.grad(loss, logits)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled_under_autocast() -> None:
    def step(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return rnnt_op.joint_rnnt_loss(*arguments)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    problem = random_joint(dtype=torch.float32)
    expected, actual = step(*problem.arguments), compiled(*problem.arguments)
    assert torch.equal(actual, expected)
    for a, e in zip(
        torch.autograd.grad(actual, problem.differentiable),
        torch.autograd.grad(expected, problem.differentiable),
        strict=True,
    ):
        assert torch.equal(a, e)


@pytest.mark.slow
def test_inductor_training_step() -> None:
    """Model, loss and backward through the default backend, over changing shapes."""
    encoder, predictor = torch.nn.Linear(4, 8), torch.nn.Embedding(11, 8)
    joint = rnnt_op.JointRNNTLoss(8, 11)
    parameters = [*encoder.parameters(), *predictor.parameters(), *joint.parameters()]

    def step(features, targets, frames, labels):
        states = predictor(torch.nn.functional.pad(targets, (1, 0)))
        return joint(torch.tanh(encoder(features)), states, targets, frames, labels)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for batch, frames, labels in ((3, 7, 5), (2, 9, 4), (5, 4, 6)):
        arguments = random_joint(batch, frames, labels).arguments[4:]
        features = torch.randn(batch, frames, 4)
        results = [
            torch.autograd.grad(function(features, *arguments), parameters)
            for function in (compiled, step)
        ]
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_traced_graph() -> None:
    """The loss is one node, and nothing of its inside is traced."""
    recorder = EagerAndRecordGraphs()
    compiled = torch.compile(
        rnnt_op.joint_rnnt_loss, fullgraph=True, dynamic=True, backend=recorder
    )
    compiled(*random_joint(dtype=torch.float32).arguments)
    (graph,) = recorder.graphs
    calls = [
        getattr(node.target, "__name__", str(node.target))
        for node in graph.graph.nodes
        if node.op.startswith("call")
    ]
    assert_expected_inline(
        "\n".join(calls),
        """\
sym_sum
ones
truediv
joint_loss_with_grads
getitem""",
    )


META_RESULTS = {
    "mean": lambda loss: rnnt_op.joint_rnnt_loss(*loss),
    "none": lambda loss: rnnt_op.joint_rnnt_loss(*loss, reduction="none"),
    "logits": lambda loss: rnnt_op.rnnt_loss(
        torch.empty(3, 7, 6, 11, device="meta"), *loss[4:], blank=0, reduction="none"
    ),
    "posteriors": lambda loss: rnnt_op.posteriors(*loss).label,
    "align": lambda loss: rnnt_op.align(*loss).frames,
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mean", ()),
        ("none", (3,)),
        ("logits", (3,)),
        ("posteriors", (3, 7, 5)),
        ("align", (3, 5)),
    ],
)
def test_meta_tensors(name: str, shape: tuple[int, ...]) -> None:
    """Shapes without data, with and without autocast, which there is none of."""
    arguments = [a.detach().to("meta") for a in random_joint(dtype=torch.float32).arguments]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = META_RESULTS[name](arguments)
    assert result.is_meta
    assert result.shape == shape


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_meta_tensors(reduction: str) -> None:
    arguments = [a.detach().to("meta") for a in random_joint().arguments]
    for argument in arguments[:4]:
        argument.requires_grad_()
    rnnt_op.joint_rnnt_loss(*arguments, reduction=reduction).sum().backward()
    assert all(a.grad.is_meta and a.grad.shape == a.shape for a in arguments[:4])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sizes_that_the_tracer_does_not_know(reduction: str) -> None:
    """Checks that a tracer cannot make hold at run time instead."""

    def function(*arguments: torch.Tensor) -> torch.Tensor:
        return rnnt_op.joint_rnnt_loss(*arguments, reduction=reduction).sum()

    problem = random_joint()
    for tensor in (problem.encoder, problem.predictor, problem.targets):
        torch._dynamo.decorators.mark_unbacked(tensor, 0)
        torch._dynamo.decorators.mark_unbacked(tensor, 1)
    for tensor in (problem.encoder_lengths, problem.target_lengths):
        torch._dynamo.decorators.mark_unbacked(tensor, 0)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*problem.arguments), function(*problem.arguments)
    assert torch.equal(actual, expected)
    gradients = torch.autograd.grad(actual, problem.differentiable)
    assert all(map(torch.equal, gradients, torch.autograd.grad(expected, problem.differentiable)))
    other = random_joint(2, 9, 3)
    assert torch.equal(compiled(*other.arguments), function(*other.arguments))
    wrong = [*problem.arguments[:4], problem.targets[:2], *problem.arguments[5:]]
    with pytest.raises(ValueError, match="targets: expected size 3 in dimension 0, the batch size"):
        compiled(*wrong)
