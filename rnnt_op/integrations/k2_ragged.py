"""As much of k2's ``RaggedTensor`` as a recipe of a transducer needs to pad its labels.

Interface: k2 1.24.4, ``k2/ragged.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RaggedTensor:
    """Rows of numbers whose lengths differ.

    Args:
        data: the rows.
        dtype: None: int32 for integers, else float32.
        device: where they are.
    """

    def __init__(
        self,
        data: Sequence[Sequence[float]],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype is None:
            is_integer = all(isinstance(value, int) for row in data for value in row)
            dtype = torch.int32 if is_integer else torch.float32
        self._rows = [torch.tensor(row, dtype=dtype, device=device) for row in data]

    def to(self, target: torch.device | str | torch.dtype) -> RaggedTensor:
        """The same rows on another device, or of another dtype."""
        moved = RaggedTensor([])
        moved._rows = [row.to(target) for row in self._rows]
        return moved

    def pad(self, mode: str = "constant", padding_value: float = 0) -> Tensor:
        """The rows, as long as the longest. [rows, longest]

        Args:
            mode: ``"constant"``, which is the only one here.
            padding_value: what stands behind shorter rows.

        Raises:
            ValueError: another mode is asked for.
        """
        if mode != "constant":
            raise ValueError(f"mode: expected 'constant', got {mode!r}")
        if not self._rows:
            return torch.empty(0, 0, dtype=torch.int32)
        return torch.nn.utils.rnn.pad_sequence(self._rows, True, padding_value)

    def tolist(self) -> list[list[float]]:
        """The rows as lists."""
        return [row.tolist() for row in self._rows]
