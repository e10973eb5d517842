"""The processes that train together: who they are, what they agree on, how they divide a model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rnnt_op import JointRNNTLoss

from .config import Parallel
from .errors import ExampleError
from .model import Transducer

# One for all shapes, except for sizes of one and sums that are long enough for another algorithm.
GRAPHS_PER_MODULE = 16


@dataclass(frozen=True)
class World:
    """This process among those of its run; one alone is a group of one.

    parallel: How they divide the work.
    rank:     Number of this process.
    size:     Number of processes.
    device:   Where this process computes.
    """

    parallel: Parallel
    rank: int
    size: int
    device: torch.device

    @property
    def part(self) -> int:
        """Which part of every batch is this process's."""
        return 0 if self.parallel == "tp" else self.rank

    @property
    def parts(self) -> int:
        """How many parts a batch has; under tp all processes see all of it."""
        return 1 if self.parallel == "tp" else self.size

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes; all must call it."""
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def agree(self, value: float) -> float:
        """The first process's value, such as its clock's; all must call it."""
        agreed = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(agreed, 0)
        return agreed.item()

    def wait(self) -> None:
        """Until all processes are here."""
        dist.barrier()

    def print(self, text: str) -> None:
        """Print once, not once for each process."""
        if self.rank == 0:
            print(text)


@contextmanager
def join_world(parallel: Parallel, device_name: str) -> Iterator[World]:
    """The group of the processes that torchrun started, or of this one alone."""
    launched = int(os.environ.get("WORLD_SIZE", "0"))
    if parallel == "none" and launched > 1:
        raise ExampleError(f"{launched} processes need --parallel ddp, fsdp or tp")
    if parallel != "none" and not launched:
        raise ExampleError(
            f"--parallel {parallel} needs torchrun --nproc-per-node N -m examples.asr"
        )
    device = _device(device_name)
    # Gloo also beside NCCL: what tensors on the CPU agree on does not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if parallel == "none":
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    try:
        yield World(parallel, dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def divide(model: Transducer, world: World, compiled: bool) -> nn.Module:
    """The model as the processes train it together; its own modules change in place.

    Compiled, as whole graphs with dynamic shapes, is what no collective interrupts: the model, but
    under fsdp its parts.
    """
    if compiled:
        parts: list[nn.Module] = [model]
        if world.parallel == "fsdp":
            parts = [*model.encoder.blocks, model.predictor, model.joint]
        # Counted are the graphs of all modules together.
        torch._dynamo.config.recompile_limit = GRAPHS_PER_MODULE * len(parts)
        for part in parts:
            part.compile(fullgraph=True, dynamic=True)
    if world.parallel == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if world.parallel != "none":
        mesh = init_device_mesh(world.device.type, (world.size,))
        if world.parallel == "fsdp":
            for part in (*model.encoder.blocks, model.joint, model):
                fully_shard(part, mesh=mesh)
        else:
            _divide_output_layer(model.joint, mesh)
    return model


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The weights of a divided model, gathered in every process; all must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def by_kind(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Whole and divided parameters apart, because operations on lists take no mixture."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) == kind] for kind in (False, True)]
    return [kind for kind in kinds if kind]


def clip_gradients(kinds: list[list[nn.Parameter]], longest: float) -> Tensor:
    """Scale gradients down to norm `longest` over all parameters of all processes.

    Returns the norm that they had. []
    """
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(whole))
    for kind in kinds:
        clip_grads_with_norm_(kind, longest, norm)
    return norm


def _divide_output_layer(layer: JointRNNTLoss, mesh: DeviceMesh) -> None:
    for name, parameter in list(layer.named_parameters()):
        part = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        setattr(layer, name, nn.Parameter(part))


def _device(name: str) -> torch.device:
    """The device of that name; of several GPUs, the one of this process."""
    available = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if available else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ExampleError(f"--device {name} is no torch device") from error
    if device.type != "cuda":
        return device
    if not available:
        raise ExampleError(f"--device {name}: torch finds no CUDA device")
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.index >= torch.cuda.device_count():
        raise ExampleError(f"--device {device}: torch finds {torch.cuda.device_count()} GPUs")
    # What cuBLAS asks for where algorithms must be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.cuda.set_device(device)
    return device
