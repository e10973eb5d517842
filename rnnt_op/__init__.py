"""Sample-wise transducer (RNN-T) loss as a ``torch.library`` custom op."""

from importlib.metadata import version

import rnnt_op.torch_library_registration as torch_library_registration
from rnnt_op import memory, reference, topologies
from rnnt_op.functional import joint_rnnt_loss, rnnt_loss
from rnnt_op.modules import JointRNNTLoss
from rnnt_op.precompile import precompile

__version__ = version("rnnt-op")

__all__ = [
    "JointRNNTLoss",
    "joint_rnnt_loss",
    "memory",
    "precompile",
    "reference",
    "rnnt_loss",
    "topologies",
    "torch_library_registration",
]
