"""What the CUDA backend asks of torch, as far as that can be seen without a GPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from expecttest import assert_expected_inline

from rnnt_op.backends import cuda_device
from rnnt_op.backends.cuda_device import CudaDevice


@pytest.mark.parametrize(
    ("operand", "result"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_matmul_fills_padded_rows(
    operand: torch.dtype,
    result: torch.dtype,
    capability: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch checks the call on tensors without data as it does on a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def rows(count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, 16, dtype=dtype, device="meta")[:, :columns]

    device = CudaDevice(torch.device("cuda", 0))
    hidden, weight, logits = rows(5, 9, operand), rows(7, 9, operand), rows(5, 7, result)
    with_data = logits.untyped_storage()
    device.matmul(hidden, weight.t(), logits)
    device.matmul(rows(5, 7, operand).t(), hidden, rows(7, 9, result))
    assert logits.stride() == (16, 1)
    assert logits.untyped_storage()._cdata == with_data._cdata
    with pytest.raises(RuntimeError):
        device.matmul(hidden, weight, logits)


def test_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(cuda_device, "launching", lambda index: nullcontext())
    device = CudaDevice(torch.device("cuda", 0))
    with pytest.raises(RuntimeError) as error, device.guard():
        pass
    assert_expected_inline(
        str(error.value),
        """rnnt_op: the loss cannot be captured in a CUDA graph, since its work depends on lengths and posteriors; call it outside the capture (torch.compile does so by itself)""",
    )
    capturing = False
    with device.guard():
        pass
