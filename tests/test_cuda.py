"""The same results on a GPU, with lengths on either device."""

from dataclasses import fields, replace

import pytest
import torch
from problems import loss_and_gradients, random_joint, relative_error

import rnnt_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("lengths_device", ["cpu", "cuda"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cuda_equals_cpu(lengths_device: str, reduction: str) -> None:
    problem = random_joint(4, 30, 12)
    expected = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, reduction=reduction)
    on_device = replace(
        problem,
        **{
            field.name: getattr(problem, field.name)
            .detach()
            .to(lengths_device if field.name.endswith("lengths") else "cuda")
            for field in fields(problem)
            if isinstance(getattr(problem, field.name), torch.Tensor)
        },
    )
    for tensor in on_device.differentiable:
        tensor.requires_grad_()
    torch.use_deterministic_algorithms(False)
    actual = loss_and_gradients(rnnt_op.joint_rnnt_loss, on_device, reduction=reduction)
    assert relative_error([actual[0].cpu()], [expected[0]]) <= 1e-12
    assert relative_error([g.cpu() for g in actual[1]], expected[1]) <= 1e-10
