"""What a data source gives: audio, its digits, and where it comes from."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Audio = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Utterance:
    """A spoken digit string.

    audio:   Samples in [-1, 1] at the source's sample rate. [N]
    digits:  The digits spoken, in order. [U]
    speaker: Name of the speaker or the synthetic voice.
    """

    audio: Audio
    digits: tuple[int, ...]
    speaker: str


class Source(Protocol):
    """Digit strings for training (endless) and test (fixed).

    Both are functions of the index alone, so that worker processes need no shared state.
    """

    @property
    def sample_rate(self) -> int:
        """Samples per second of every utterance."""

    @property
    def test_size(self) -> int:
        """Number of test utterances."""

    def training(self, index: int) -> Utterance:
        """Training utterance number `index`, the same for every call."""

    def test(self, index: int) -> Utterance:
        """Test utterance number `index` < `test_size`, the same for every call and every seed."""
