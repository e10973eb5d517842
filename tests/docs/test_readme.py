"""The usage in README.md runs as it stands."""

import re

import pytest
import torch
from places import ROOT

README = ROOT / "README.md"


@pytest.mark.slow
def test_usage() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    torch._dynamo.reset()
    predictor = torch.nn.Sequential(
        torch.nn.ConstantPad1d((1, 0), 0), torch.nn.Embedding(1024, 640)
    )
    namespace = {
        "encoder": torch.nn.Linear(80, 640),
        "predictor": predictor,
        "features": torch.randn(3, 9, 80),
        "targets": torch.randint(1, 1024, (3, 4)),
        "encoder_lengths": torch.tensor([9, 7, 4]),
        "target_lengths": torch.tensor([2, 4, 0]),
    }
    exec(code, namespace)
    gradients = [p.grad for p in namespace["step"].parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
