"""What an installed package must do wherever it is called from."""

import subprocess
import sys
from pathlib import Path

import torch

import rnnt_op

assert Path(sys.prefix) in Path(rnnt_op.__file__).parents, rnnt_op.__file__
torch.manual_seed(0)
encoder, predictor, weight, bias = (
    torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    for shape in ((2, 7, 8), (2, 5, 8), (11, 8), (11,))
)
lengths = torch.tensor([7, 5]), torch.tensor([4, 2])
arguments = (encoder, predictor, weight, bias, torch.randint(1, 11, (2, 4)), *lengths)
ours, right = (
    (loss, *torch.autograd.grad(loss, arguments[:4]))
    for loss in (rnnt_op.joint_rnnt_loss(*arguments), rnnt_op.reference.joint_rnnt_loss(*arguments))
)
torch.testing.assert_close(ours, right)
for word in ("--help", "doctor"):
    command = [str(Path(sys.executable).with_name("rnnt-op")), word]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
print(f"rnnt_op {rnnt_op.__version__} works from {Path(rnnt_op.__file__).parent}")
