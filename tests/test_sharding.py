"""DDP and FSDP2 around the module are right; DTensors as inputs are refused in words."""

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from problems import random_joint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import rnnt_op


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("position", range(4))
def test_dtensor_is_refused(mesh, position: int, requires_grad: bool) -> None:
    arguments = [
        t.detach().requires_grad_(requires_grad) if t.is_floating_point() else t
        for t in random_joint(dtype=torch.float32).arguments
    ]
    placement = Replicate() if position < 2 else Shard(0)
    arguments[position] = distribute_tensor(arguments[position].detach(), mesh, [placement])
    with pytest.raises(TypeError) as error:
        rnnt_op.joint_rnnt_loss(*arguments)
    assert_expected_inline(
        str(error.value),
        """rnnt_op: got a DTensor; the op takes whole local tensors. If FSDP2 shards the output layer, let the module that owns it call the loss in its forward, as rnnt_op.JointRNNTLoss does, or name the method that reads the weight to torch.distributed.fsdp.register_fsdp_forward_method. Otherwise gather the tensor with .full_tensor(), or take this rank's part with .to_local().""",
    )


def test_dtensor_logits_are_refused(mesh) -> None:
    logits = distribute_tensor(torch.randn(3, 7, 6, 11), mesh, [Replicate()])
    with pytest.raises(TypeError, match="got a DTensor"):
        rnnt_op.rnnt_loss(logits, *random_joint().arguments[4:], blank=0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("mesh")
def test_ddp(compiled: bool) -> None:
    problem = random_joint(dtype=torch.float32)
    inputs = *problem.arguments[:2], *problem.arguments[4:]
    module = rnnt_op.JointRNNTLoss(8, 11)
    expected = torch.autograd.grad(module(*inputs), tuple(module.parameters()))
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    if compiled:
        torch._dynamo.reset()
        parallel = torch.compile(parallel, backend="aot_eager", dynamic=True)
    parallel(*inputs).backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("compiled", [False, True])
def test_fsdp2_module_owns_the_weight(mesh, compiled: bool) -> None:
    problem = random_joint(dtype=torch.float32)
    inputs = *problem.arguments[:2], *problem.arguments[4:]
    module = rnnt_op.JointRNNTLoss(8, 11)
    expected = module(*inputs)
    expected_gradients = torch.autograd.grad(expected, tuple(module.parameters()))
    fully_shard(module, mesh=mesh)
    if compiled:
        torch._dynamo.reset()
        module.compile(backend="aot_eager", dynamic=True)
    loss = module(*inputs)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(module.parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient)
