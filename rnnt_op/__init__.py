"""Sample-wise transducer (RNN-T) loss as a ``torch.library`` custom op."""

from importlib.metadata import version

import rnnt_op.torch_library_registration as torch_library_registration
from rnnt_op import memory, reference, topologies
from rnnt_op.functional import joint_rnnt_loss, rnnt_loss
from rnnt_op.inference import Alignment, Posteriors, align, posteriors
from rnnt_op.modules import JointRNNTLoss
from rnnt_op.precompile import precompile
from rnnt_op.ranges import alignment_ranges, pruned_ranges

__version__ = version("rnnt-op")

__all__ = [
    "Alignment",
    "JointRNNTLoss",
    "Posteriors",
    "align",
    "alignment_ranges",
    "joint_rnnt_loss",
    "memory",
    "posteriors",
    "precompile",
    "pruned_ranges",
    "reference",
    "rnnt_loss",
    "topologies",
    "torch_library_registration",
]
