"""The streaming transducer: causal encoder, stateless predictor, joint network with its loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rnnt_op import JointRNNTLoss

from .config import Config
from .features import MEL_BINS
from .vocabulary import BLANK

SUBSAMPLING = 4


def encoder_lengths(feature_lengths: Tensor) -> Tensor:
    """Encoder frames for each number of feature frames: rounded up quarters. [B] -> [B]"""
    return (feature_lengths + SUBSAMPLING - 1) // SUBSAMPLING


def causal_windows(frames: Tensor, kernel: int, stride: int = 1, dilation: int = 1) -> Tensor:
    """What a causal convolution over time sees; it is a linear layer of this.

    Spelt out because the compiled backward of `aten.convolution` recompiles for every length on
    the CPU (torch 2.13).

    frames:  [B, T, D]
    Returns  [B, ceil(T / stride), kernel * D], earliest frame first; window t ends at t * stride.
    """
    count = (frames.shape[1] + stride - 1) // stride
    padded = F.pad(frames, (0, 0, (kernel - 1) * dilation, 0))
    starts = range(0, kernel * dilation, dilation)
    span = stride * (count - 1) + 1
    return torch.cat([padded[:, start : start + span : stride] for start in starts], dim=-1)


class Subsampling(nn.Module):
    """A strided convolution over time, then a linear layer.

    Output frame t sees feature frames up to 4 t.
    """

    KERNEL = 8

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convolution = nn.Linear(self.KERNEL * MEL_BINS, 2 * dim)
        self.project = nn.Linear(2 * dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, 48] -> [B, ceil(T / 4), D]"""
        windows = causal_windows(features, self.KERNEL, stride=SUBSAMPLING)
        output: Tensor = self.project(F.silu(self.convolution(windows)))
        return output


class Block(nn.Module):
    """A residual time-delay layer: dilated causal convolution, then a projection per frame."""

    KERNEL = 3

    def __init__(self, dim: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm = nn.LayerNorm(dim)
        self.convolution = nn.Linear(self.KERNEL * dim, 4 * dim)
        self.project = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        windows = causal_windows(self.norm(hidden), self.KERNEL, dilation=self.dilation)
        update: Tensor = self.dropout(self.project(F.silu(self.convolution(windows))))
        return hidden + update


class Encoder(nn.Module):
    """Causal in time except for a fixed look-ahead.

    The look-ahead is a delay: output frame t is what the causal stack knows at frame
    t + lookahead, so it depends on feature frames up to 4 (t + lookahead). Normalisation is per
    frame and padding lies after the end, so padding reaches no valid frame.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.lookahead = config.lookahead
        self.subsampling = Subsampling(config.dim)
        self.blocks = nn.Sequential(
            *(Block(config.dim, dilation, config.dropout) for dilation in config.dilations)
        )
        self.project = nn.Sequential(
            nn.LayerNorm(config.dim), nn.Linear(config.dim, config.joint_dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, 48] -> [B, ceil(T / 4), H]"""
        features = F.pad(features, (0, 0, 0, SUBSAMPLING * self.lookahead))
        hidden = self.subsampling(features)
        output: Tensor = self.project(self.blocks(hidden)[:, self.lookahead :])
        return output


class Predictor(nn.Module):
    """Stateless predictor (Ghodsi et al. 2020): a function of the last two labels alone."""

    CONTEXT = 2

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        # Blank stands before the first label and is the zero vector, so that `forward` can pad
        # embeddings instead of integer labels, whose compiled padding reads out of bounds on the
        # CPU (torch 2.13).
        self.embedding = nn.Embedding(vocab_size, config.dim, padding_idx=BLANK)
        self.combine = nn.Linear(self.CONTEXT * config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.project = nn.Linear(config.dim, config.joint_dim)

    def forward(self, targets: Tensor) -> Tensor:
        """States before and after each label. [B, U] -> [B, U + 1, H]"""
        return self._states(F.pad(self.embedding(targets), (0, 0, self.CONTEXT, 0)))

    def step(self, context: Tensor) -> Tensor:
        """The state after the last CONTEXT labels. [B, CONTEXT] -> [B, H]"""
        return self._states(self.embedding(context)).squeeze(1)

    def _states(self, embedded: Tensor) -> Tensor:
        pairs = torch.cat([embedded[:, :-1], embedded[:, 1:]], dim=-1)
        states: Tensor = self.project(self.dropout(F.silu(self.combine(pairs))))
        return states

    def start(self, batch: int, device: torch.device) -> Tensor:
        """The context before the first label. [B, CONTEXT]"""
        return torch.full((batch, self.CONTEXT), BLANK, device=device)


class Transducer(nn.Module):
    """Encoder, predictor and joint network; calling it gives the loss."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.predictor = Predictor(config, vocab_size)
        self.joint = JointRNNTLoss(config.joint_dim, vocab_size, blank=BLANK, reduction="sum")

    def forward(
        self, features: Tensor, feature_lengths: Tensor, targets: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Sum of the utterances' transducer losses. []

        features:        [B, T, 48]
        feature_lengths: [B] int64, on the CPU
        targets:         [B, U]
        target_lengths:  [B] int64, on the CPU
        """
        loss: Tensor = self.joint(
            self.encoder(features),
            self.predictor(targets),
            targets,
            encoder_lengths(feature_lengths),
            target_lengths,
        )
        return loss
