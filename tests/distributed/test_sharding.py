"""DTensors are refused in words, except for an output layer sharded by rows."""

import pytest
import torch
import torch.distributed as dist
from problems import random_joint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import rnnt_op


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("position", [0, 1])
def test_dtensor_is_refused(mesh, position: int, requires_grad: bool) -> None:
    arguments = [
        t.detach().requires_grad_(requires_grad) if t.is_floating_point() else t
        for t in random_joint(dtype=torch.float32).arguments
    ]
    arguments[position] = distribute_tensor(arguments[position].detach(), mesh, [Replicate()])
    with pytest.raises(TypeError, match="got a DTensor"):
        rnnt_op.joint_rnnt_loss(*arguments)


def test_dtensor_logits_are_refused(mesh) -> None:
    logits = distribute_tensor(torch.randn(3, 7, 6, 11), mesh, [Replicate()])
    with pytest.raises(TypeError, match="got a DTensor"):
        rnnt_op.rnnt_loss(logits, *random_joint().arguments[4:], blank=0)
