"""The mask of the joint network's dropout in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from rnnt_op.backends.records import Dropout
from rnnt_op.nodes import FramesAndStates, Rows

_LOW = 0xFFFFFFFF


def dropped(dropout: Dropout, rows: Rows, packed: FramesAndStates, joint_dim: int) -> Tensor:
    """Whether each element of some hidden states is dropped. [R, H]"""
    sample, t = packed.frame_positions
    low, high = dropout.seed & _LOW, dropout.seed >> 32 & _LOW
    words = philox(
        torch.arange(-(-joint_dim // 4), device=low.device).unsqueeze(0),
        packed.state_index.index_select(0, rows.state).unsqueeze(1),
        t.index_select(0, rows.frame).unsqueeze(1),
        sample.index_select(0, rows.frame).unsqueeze(1),
        (low, high),
    )
    return torch.stack(words, 2).flatten(1)[:, :joint_dim] < dropout.threshold


def philox(
    x: Tensor, y: Tensor, z: Tensor, w: Tensor, key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words of Philox4x32-10 for counters (x, y, z, w), all of them 32 bits in int64."""
    low, high = key
    for _ in range(10):
        # A product may take all 64 bits and look negative; its words are right nonetheless.
        a, b = x * 0xD2511F53, z * 0xCD9E8D57
        x, y = (b >> 32 & _LOW) ^ y ^ low, b & _LOW
        z, w = (a >> 32 & _LOW) ^ w ^ high, a & _LOW
        low, high = low + 0x9E3779B9 & _LOW, high + 0xBB67AE85 & _LOW
    return x, y, z, w
