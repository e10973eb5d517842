"""Batches bucketed by duration, so that every step has a shape of its own: none compiles anew, and
none leaves memory behind.
"""

import ctypes
import gc
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from problems import random_labels
from torch import Tensor, nn
from torch._dynamo.utils import counters

import rnnt_op
from rnnt_op.tools.study.measure import resident_bytes

FEATURES, JOINT_DIM, VOCAB_SIZE = 16, 128, 32
FRAMES_OF_A_BATCH = 800
MIB = 2**20


class Transducer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, JOINT_DIM)
        self.predictor = nn.Embedding(VOCAB_SIZE, JOINT_DIM)
        self.head = rnnt_op.JointRNNTLoss(JOINT_DIM, VOCAB_SIZE)

    def forward(self, features: Tensor, targets: Tensor, *lengths: Tensor) -> Tensor:
        encoded = self.encoder(features).tanh()
        predicted = self.predictor(nn.functional.pad(targets, (1, 0)))
        return self.head(encoded, predicted, targets, *lengths)


def shapes(count: int, seed: int) -> list[tuple[int, int, int]]:
    """Different (B, T, U) in any order, with about the same number of frames."""
    durations = random.Random(seed).sample(range(20, 200), count)
    return [(FRAMES_OF_A_BATCH // frames, frames, frames // 8) for frames in durations]


def train(
    model: nn.Module, step: Callable[..., Tensor], batches: Sequence[tuple[int, int, int]]
) -> None:
    for batch, frames, labels in batches:
        model.zero_grad()
        step(
            torch.randn(batch, frames, FEATURES),
            random_labels((batch, labels), VOCAB_SIZE, 0),
            torch.randint(1, frames + 1, (batch,)),
            torch.randint(0, labels + 1, (batch,)),
        ).backward()


def test_fifty_shapes_compile_three_graphs_at_most() -> None:
    """Left to itself, the compiler takes sizes for constants until it has seen them change."""
    torch._dynamo.reset()
    counters.clear()
    model = Transducer()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(model, step, shapes(50, seed=0))
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("compiled", [False, True])
def test_shapes_leave_nothing_behind(compiled: bool) -> None:
    """Not a second graph either."""
    torch._dynamo.reset()
    counters.clear()
    model = Transducer()
    step = model
    if compiled:
        step = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    train(model, step, shapes(20, seed=0))
    tensors, resident = live_tensors(), live_bytes()
    train(model, step, shapes(60, seed=1))
    assert live_tensors() <= tensors  # what tests before this one left may go
    # The encoder states' gradients alone, if each step kept them, would be 24 MiB.
    assert live_bytes() <= resident + 16 * MIB
    assert counters["stats"]["unique_graphs"] == compiled


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def live_bytes() -> int:
    """What this process holds, without the holes of glibc's heap."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return resident_bytes("VmRSS")
