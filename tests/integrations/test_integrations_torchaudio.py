"""torchaudio's loss under our name, against torchaudio and against the reference."""

import io

import pytest
import torch
from integration_support import assert_equal, random_logits, required, value_and_gradients

from rnnt_op import reference
from rnnt_op.integrations.torchaudio import RNNTLoss, rnnt_loss

OPTIONS = [
    {},
    {"blank": 0},
    {"blank": 2, "reduction": "none"},
    {"reduction": "sum", "clamp": 0.05},
    {"fused_log_softmax": False},
    {"fused_log_softmax": False, "reduction": "none", "blank": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_torchaudio(options: dict) -> None:
    theirs = required("torchaudio")
    problem = random_logits(blank=options.get("blank", -1)).to(torch.float32, torch.int32)
    if not options.get("fused_log_softmax", True):
        logits = problem.logits.detach().log_softmax(-1).requires_grad_()
        problem = type(problem)(logits, *problem.arguments[1:])
    pairs = [
        (RNNTLoss(**options), theirs.transforms.RNNTLoss(**options)),
        (
            lambda *arguments: rnnt_loss(*arguments, **options),
            lambda *arguments: theirs.functional.rnnt_loss(*arguments, **options),
        ),
    ]
    for ours, torchaudios in pairs:
        actual, expected = (
            value_and_gradients(loss(*problem.arguments), [problem.logits])
            for loss in (ours, torchaudios)
        )
        assert_equal(actual, expected, tolerance=2e-5)


HALF = [{"blank": 0, "reduction": reduction} for reduction in ("none", "mean", "sum")]


@pytest.mark.parametrize("options", HALF, ids=str)
def test_half_in_half_out(options: dict) -> None:
    problem = random_logits().to(torch.float16, torch.int32)
    loss = rnnt_loss(*problem.arguments, **options)
    assert loss.dtype == RNNTLoss(**options)(*problem.arguments).dtype == torch.float16
    wide = problem.to(torch.float64)
    expected = reference.rnnt_loss(*wide.arguments, **options)
    actual = value_and_gradients(loss, [problem.logits])
    assert actual[1].dtype == torch.float16
    assert_equal(actual, value_and_gradients(expected, [wide.logits]), 1e-3)


@pytest.mark.parametrize("options", HALF, ids=str)
def test_half_equals_torchaudio(options: dict) -> None:
    theirs = required("torchaudio")
    problem = random_logits().to(torch.float16, torch.int32)
    actual, expected = (
        value_and_gradients(loss(*problem.arguments, **options), [problem.logits])
        for loss in (rnnt_loss, theirs.functional.rnnt_loss)
    )
    assert [tensor.dtype for tensor in actual] == [tensor.dtype for tensor in expected]
    assert_equal(actual, expected, 5e-3)


def test_other_dtypes_keep_their_precision() -> None:
    problem = random_logits()
    for dtype, of_loss in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert rnnt_loss(*problem.to(dtype).arguments, blank=0).dtype == of_loss


@pytest.mark.filterwarnings("ignore:.torch.jit.save:DeprecationWarning")
def test_torch_script() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output_layer = torch.nn.Linear(5, 5)
            self.loss = RNNTLoss(0, clamp=1)

        def forward(
            self, x: torch.Tensor, targets: torch.Tensor, frames: torch.Tensor, labels: torch.Tensor
        ) -> torch.Tensor:
            return self.loss(self.output_layer(x), targets, frames, labels)

    problem = random_logits().to(torch.float32)
    model = Model()
    inputs = [problem.logits, *model.parameters()]
    actual, expected = (
        value_and_gradients(module(*problem.arguments), inputs)
        for module in (torch.jit.script(model), model)
    )
    assert_equal(actual, expected, 1e-6)
    with pytest.raises(RuntimeError, match="Could not export Python function call 'rnnt_loss'"):
        torch.jit.save(torch.jit.script(model), io.BytesIO())


@pytest.mark.parametrize("options", [o for o in OPTIONS if "clamp" not in o], ids=str)
def test_equals_reference(options: dict) -> None:
    problem = random_logits(blank=options.get("blank", -1))
    actual, expected = (
        value_and_gradients(loss, [problem.logits])
        for loss in (
            RNNTLoss(**options)(*problem.arguments),
            reference.rnnt_loss(*problem.arguments, **options),
        )
    )
    assert_equal(actual, expected)


def test_clamp_cuts_each_sample_before_the_upstream_gradient() -> None:
    problem = random_logits()
    losses = reference.rnnt_loss(*problem.arguments, blank=0, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), problem.logits)
    loss = RNNTLoss(blank=0, clamp=0.05)(*problem.arguments)
    (actual,) = torch.autograd.grad(loss, problem.logits)
    assert gradient.abs().max() > 0.05
    assert_equal([actual], [gradient.clamp(-0.05, 0.05) / len(losses)])
