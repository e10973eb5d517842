"""Recorded digits, joined into strings of one speaker with short pauses."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from .digits import STRING_LENGTHS, VOCABULARY, digits_to_text, longest_string
from .errors import ExampleError
from .utterance import Audio, Utterance

TEST_INDICES = range(5)
TEST_ROUNDS = 4
PAUSE_SECONDS = (0.0, 0.25)
EDGE_SECONDS = (0.05, 0.25)
# Room noise of a quiet recording, so that a pause is not digital silence.
PAUSE_NOISE = 3e-4
_NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>.+)_(?P<index>\d+)\.wav")


@dataclass(frozen=True)
class Recording:
    """One digit spoken once."""

    digit: int
    speaker: str
    index: int
    audio: Audio  # [N]


def parse_name(name: str) -> tuple[int, str, int] | None:
    """`{digit}_{speaker}_{index}.wav` to (digit, speaker, index); None for other names."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return int(match["digit"]), match["speaker"], int(match["index"])


def read_recordings(folder: Path) -> tuple[list[Recording], int]:
    """All recordings of a folder, in the order of their names, and their common sample rate."""
    if not folder.is_dir():
        raise ExampleError(f"--data {folder} is not a folder")
    recordings = []
    rates: set[int] = set()
    for path in sorted(folder.iterdir()):
        parsed = parse_name(path.name)
        if parsed is None:
            continue
        try:
            audio, rate = soundfile.read(path, dtype="float32")
        except soundfile.LibsndfileError as error:
            raise ExampleError(f"{path} cannot be read: {error}") from error
        if audio.ndim != 1 or len(audio) == 0:
            raise ExampleError(f"{path} must be mono and not empty, got shape {audio.shape}")
        rates.add(int(rate))
        recordings.append(Recording(*parsed, audio))
    if not recordings:
        raise ExampleError(
            f"--data {folder} has no files named {{digit}}_{{speaker}}_{{index}}.wav"
        )
    if len(rates) > 1:
        raise ExampleError(f"--data {folder} mixes sample rates {sorted(rates)}")
    return recordings, rates.pop()


def join(recordings: list[Recording], sample_rate: int, rng: np.random.Generator) -> Utterance:
    """Recordings of one speaker, one after the other with short pauses between and around."""
    pieces = [_pause(EDGE_SECONDS, sample_rate, rng)]
    for position, recording in enumerate(recordings):
        if position > 0:
            pieces.append(_pause(PAUSE_SECONDS, sample_rate, rng))
        pieces.append(recording.audio)
    pieces.append(_pause(EDGE_SECONDS, sample_rate, rng))
    return Utterance(
        audio=np.concatenate(pieces),
        text=digits_to_text(recording.digit for recording in recordings),
        speaker=recordings[0].speaker,
    )


def _pause(seconds: tuple[float, float], sample_rate: int, rng: np.random.Generator) -> Audio:
    length = round(rng.uniform(*seconds) * sample_rate)
    return PAUSE_NOISE * rng.standard_normal(length, dtype=np.float32)


class RecordedStrings:
    """Strings joined from a folder of recorded digits; indices 0-4 are the test split."""

    vocabulary = VOCABULARY
    seconds = None

    def __init__(self, folder: Path, seed: int) -> None:
        recordings, self.sample_rate = read_recordings(folder)
        self.seed = seed
        self._training = _by_speaker([r for r in recordings if r.index not in TEST_INDICES])
        self._test = _partition(_by_speaker([r for r in recordings if r.index in TEST_INDICES]))
        if not self._training or not self._test:
            raise ExampleError(
                f"--data {folder} needs recordings with index 0-4 (test) and above (training)"
            )
        self.test_size = len(self._test)

    def training(self, index: int) -> Utterance:
        """A fresh random string of a random speaker."""
        rng = np.random.default_rng((3, self.seed, index))
        speakers = self._training
        recordings = speakers[rng.integers(len(speakers))]
        size = rng.integers(STRING_LENGTHS[0], longest_string(index) + 1)
        picks = rng.integers(len(recordings), size=size)
        return join([recordings[pick] for pick in picks], self.sample_rate, rng)

    def test(self, index: int) -> Utterance:
        """String `index` of the test split."""
        return join(self._test[index], self.sample_rate, np.random.default_rng((4, index)))


def _by_speaker(recordings: list[Recording]) -> list[list[Recording]]:
    speakers = sorted({recording.speaker for recording in recordings})
    return [[r for r in recordings if r.speaker == speaker] for speaker in speakers]


def _partition(speakers: list[list[Recording]]) -> list[list[Recording]]:
    """Cut each speaker's shuffled recordings into strings, so that all count equally."""
    rng = np.random.default_rng(4)
    low, high = STRING_LENGTHS
    strings = []
    for recordings in speakers:
        for _ in range(TEST_ROUNDS):
            rest = [recordings[i] for i in rng.permutation(len(recordings))]
            while rest:
                size = int(rng.integers(low, high + 1))
                if len(rest) <= high:
                    size = len(rest)
                elif len(rest) - size == 1:  # a single digit would be left over
                    size -= 1
                strings.append(rest[:size])
                rest = rest[size:]
    return strings
