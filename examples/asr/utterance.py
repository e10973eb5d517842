"""What a data source gives: audio, its words, and where it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .vocabulary import Vocabulary

Audio = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Utterance:
    """Something said.

    audio:   Samples in [-1, 1] at the source's sample rate. [N]
    text:    The words spoken.
    speaker: Name of the speaker or the synthetic voice.
    """

    audio: Audio
    text: str
    speaker: str


class Source(Protocol):
    """Utterances for training (endless) and test (fixed).

    Both are functions of the index alone, so that worker processes need no shared state.
    """

    @property
    def vocabulary(self) -> Vocabulary:
        """The labels of the utterances' texts."""

    @property
    def sample_rate(self) -> int:
        """Samples per second of every utterance."""

    @property
    def seconds(self) -> Sequence[float] | None:
        """Durations of the training utterances of an epoch; None where no two are the same."""

    @property
    def test_size(self) -> int:
        """Number of test utterances."""

    def training(self, index: int) -> Utterance:
        """Training utterance number `index`, the same for every call; epoch follows epoch."""

    def test(self, index: int) -> Utterance:
        """Test utterance number `index` < `test_size`, the same for every call and every seed."""
