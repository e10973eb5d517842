"""A vocabulary whose columns are spread over ranks.

Each rank has some rows of the output layer, so some columns of the logits, and everything else
whole. Of a node the ranks exchange what its scores take, log Σ exp of their tokens and the logits
of its symbols: O(nodes), whatever V is. With the same scores on all ranks, so are lattices,
selection and losses; each then adds up its own columns' part of the encoder's and predictor's
gradients, which are summed over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rnnt_op.arguments import NetworkArguments
from rnnt_op.batch import Batch
from rnnt_op.nodes import Rows
from rnnt_op.topology import NO_LABEL, Topology
from rnnt_op.torch_private import assert_on_device
from rnnt_op.transfer import to_device
from rnnt_op.validation import FLOAT_DTYPES, check_tensor, is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


N = TypeVar("N", bound=NetworkArguments)

_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # odd, of 64 bits


@dataclass(frozen=True)
class Shard:
    """The columns that this rank has."""

    group: dist.ProcessGroup
    first: int
    count: int
    all_columns: int  # of all ranks

    def columns(self, columns: Tensor) -> Tensor:
        """Where columns of the whole are in this rank's, ``NO_LABEL`` if elsewhere."""
        return (columns - self.first).where(self._is_mine(columns), columns.clamp(max=NO_LABEL))

    def tokens(self, tokens: int) -> int:
        """How many of this rank's columns are among the first ``tokens`` of all."""
        return min(max(tokens - self.first, 0), self.count)

    def normalized(
        self, topology: Topology, columns: Tensor, rows: Rows, logits: Tensor, others: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of some nodes, from what each rank knows.

        Args:
            topology: whose symbols they are.
            columns: of the whole, of each symbol of a state. [P, S]
            rows: the nodes.
            logits: of the symbols that this rank has. [N, S]
            others: log Σ exp of this rank's tokens that are no symbols. [N]

        Returns:
            Log-probability of each symbol [N, S], and log Σ exp of softmax 0 [N].
        """
        mine = self._is_mine(columns).index_select(0, rows.state)
        part = torch.cat([logits.where(mine, 0.0), others.unsqueeze(1)], 1)
        parts = part.new_empty((dist.get_world_size(self.group), *part.shape))
        dist.all_gather(list(parts.unbind()), part, group=self.group)
        exists = (columns != NO_LABEL).index_select(0, rows.state)
        scores = parts[..., :-1].sum(0).masked_fill_(~exists, float("-inf"))
        return normalized(topology, scores, parts[..., -1].logsumexp(0))

    def check_batch(self, batch: Batch) -> None:
        """Checks that all ranks have the same lengths and labels, without waiting for a GPU.

        Raises:
            ValueError: they have not; on a GPU a device-side assertion.
        """
        targets = batch.targets
        lengths = to_device(
            torch.tensor([batch.frames, batch.labels], device="cpu"), targets.device
        )
        is_label = torch.arange(targets.shape[1], device=targets.device) < lengths[1].unsqueeze(1)
        numbers = torch.cat([lengths.flatten(), targets.where(is_label, -1).long().flatten()])
        place = torch.arange(len(numbers), device=targets.device)
        # Products and their sum wrap around.
        digest = (numbers * (place * _MULTIPLIER + 1)).sum().unsqueeze(0)
        digests = [torch.empty_like(digest) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(digests, digest, group=self.group)
        is_same = (torch.cat(digests) == digest).all()
        message = (
            "rnnt_op: ranks that share an output layer got different batches. All take the same "
            "inputs. If FSDP2 shards the layer, call the loss in the forward of the module that "
            "owns it, or name its method to register_fsdp_forward_method"
        )
        if targets.device.type == "cuda":
            assert_on_device(is_same, message)
        elif not is_same:
            raise ValueError(message)

    def summed(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts."""
        part = part.contiguous()
        dist.all_reduce(part, group=self.group)
        return part

    def agreed(self, value: Tensor) -> Tensor:
        """The first rank's value."""
        value = value.clone()
        dist.broadcast(value, group=self.group, group_src=0)
        return value

    def _is_mine(self, columns: Tensor) -> Tensor:
        return (columns >= self.first) & (columns < self.first + self.count)


def normalized(topology: Topology, logits: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each symbol, and log Σ exp of softmax 0.

    Args:
        topology: whose symbols they are.
        logits: of the symbols, −∞ where there is none. [N, S]
        others: log Σ exp of the tokens that are no symbols. [N]
    """
    # Column by column: the host would wait for the copy of a list of indices to the device.
    columns = list(zip(topology.symbols, logits.unbind(1), strict=True))
    members: tuple[list[Tensor], list[Tensor]] = [], []
    for symbol, column in columns:
        members[symbol.softmax].append(column)
    members[0].append(others)
    normalizers = [torch.stack(of_softmax, 1).logsumexp(1) for of_softmax in members if of_softmax]
    scores = torch.stack([column - normalizers[symbol.softmax] for symbol, column in columns], 1)
    return scores.masked_fill_(logits == -torch.inf, float("-inf")), normalizers[0]


def local_output_layer(network: N, process_group: dist.ProcessGroup | None) -> N:
    """The arguments with this rank's rows of weight and bias, and where these stand among all.

    Args:
        network: with the weight [V, H] and the bias [V] as the caller holds them: whole, DTensors,
            or a rank's rows.
        process_group: the ranks, if they have rows each.

    Raises:
        TypeError: a DTensor is not sharded by rows, or only one of weight and bias is one.
    """
    weight, bias = network.weight, network.bias
    if is_dtensor(weight):
        _check_placement("weight", weight)
        if bias is not None:
            if not is_dtensor(bias):
                raise TypeError(
                    "bias: expected a DTensor, as weight is, got a plain tensor; distribute it "
                    "with placement Shard(0), too"
                )
            _check_placement("bias", bias)
        mesh, columns = weight.device_mesh, weight.shape[0]
        return replace(
            network,
            weight=weight.to_local(),
            bias=None if bias is None else bias.to_local(),
            process_group=mesh.get_group().group_name,
            # As torch.chunk cuts.
            first_column=min(mesh.get_local_rank() * -(-columns // mesh.size()), columns),
            all_columns=columns,
        )
    if weight is None or process_group is None:
        return network
    check_tensor("weight", weight, FLOAT_DTYPES)
    rows = weight.shape[0] if weight.dim() > 0 else 0
    return replace(
        network,
        process_group=process_group.group_name,
        first_column=dist.get_rank(process_group) * rows,
        all_columns=dist.get_world_size(process_group) * rows,
    )


def _check_placement(name: str, tensor: DTensor) -> None:
    from torch.distributed.tensor import Shard as Placement

    if tensor.device_mesh.ndim != 1 or tensor.placements != (Placement(0),):
        raise TypeError(
            f"{name}: expected a DTensor with placement Shard(0) on a mesh of one dimension, got "
            f"{tensor.placements} on one of {tensor.device_mesh.ndim}; redistribute it, or take "
            "the whole with .full_tensor()"
        )
