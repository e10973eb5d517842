"""Everything a run can be told, as one frozen dataclass; the command line is made from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import ExampleError

DEFAULT_MINUTES = 10.0

Parallel = Literal["none", "ddp", "fsdp", "tp"]

POSITIVE = (
    "steps",
    "minutes",
    "vocab_size",
    "checkpoint_every",
    "batch_size",
    "batch_seconds",
    "evaluations",
    "log_every",
    "test_strings",
)


@dataclass(frozen=True)
class Config:
    """Train a streaming transducer on spoken digit strings or on a corpus.

    Without --data or --librispeech, digits are synthesised on the fly with eSpeak NG. Training ends
    at --steps or --minutes, whichever comes first; with neither, after 10 minutes.
    """

    data: Path | None = None
    """Folder of recorded digits named {digit}_{speaker}_{index}.wav."""
    librispeech: Path | None = None
    """Folder of a corpus in LibriSpeech's layout: ID.flac beside *.trans.txt, at any depth."""
    held_out: float | str = 0.02
    """LibriSpeech: share of the utterances kept for evaluation, or the subfolder that is, as
    dev-clean. Subfolders dev-* and test-* are never trained on."""
    vocab_size: int = 500
    """LibriSpeech: most subword labels, blank included; a small corpus yields fewer."""
    out: Path = Path("runs/asr")
    """Folder for checkpoints, weights, metrics.jsonl, TensorBoard's files and training.png."""
    resume: bool = False
    """Continue from the newest checkpoint in --out, if there is one."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step makes one, too."""
    parallel: Parallel = "none"
    """How the processes started by torchrun divide the work. ddp: the batch. fsdp: the batch and
    the weights. tp: the output layer's vocabulary."""
    steps: int | None = None
    """Number of optimizer steps."""
    minutes: float | None = None
    """Wall-clock budget, compilation and evaluation included."""
    seed: int = 0
    """Seed of the weights, the data and the augmentation."""
    device: str = "auto"
    """Torch device; "auto" takes CUDA when there is one, and each process a GPU of its own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs model and loss under autocast."""
    compile: bool = True
    """Run what no collective interrupts under torch.compile(fullgraph=True)."""
    workers: int = 1
    """Background processes that make training data for each process that trains; 0 makes it in
    the latter."""

    # Compiled sums over more than 4096 frames take another algorithm and so another graph: with 16
    # strings, that is beyond 10 s.
    batch_size: int = 16
    """Digit strings per step, in all processes together. Also utterances per batch of evaluation,
    in each process."""
    batch_seconds: float = 300.0
    """LibriSpeech: longest batch, in all processes together, padding included and before changes
    of speed."""
    time_mask_frames: int = 6
    """Longest stretch that SpecAugment masks, in frames of 10 ms."""
    learning_rate: float = 1e-3
    """Peak learning rate: linear warm-up, then a cosine to zero over the budget."""
    warmup_steps: int = 100
    """Steps of linear warm-up (at most a tenth of --steps)."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    clip_norm: float = 5.0
    """Gradients are scaled down to this norm."""
    evaluations: int = 8
    """Evaluations on held-out data, spread evenly over the budget."""
    log_every: int = 10
    """Steps per training line in metrics.jsonl."""
    test_strings: int = 240
    """Held-out synthetic strings (recordings: every test recording is used four times)."""

    dim: int = 128
    """Width of the encoder and the predictor."""
    joint_dim: int = 128
    """Width H of the joint network."""
    dilations: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    """Encoder blocks, each by the frames between the taps of its convolution."""
    lookahead: int = 3
    """Encoder frames (40 ms each) of look-ahead."""
    dropout: float = 0.1
    """Dropout in the encoder and the predictor."""

    def __post_init__(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ExampleError(f"--{name.replace('_', '-')} must be positive, got {value}")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ExampleError(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.data is not None and self.librispeech is not None:
            raise ExampleError("--data and --librispeech exclude each other")
        if not isinstance(self.held_out, str) and not 0 < self.held_out < 1:
            raise ExampleError(f"--held-out must be between 0 and 1, got {self.held_out}")

    @property
    def seconds(self) -> float | None:
        """Wall-clock budget in seconds; None when only --steps bounds the run."""
        if self.minutes is None:
            return None if self.steps is not None else DEFAULT_MINUTES * 60
        return self.minutes * 60
