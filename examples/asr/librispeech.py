"""Transcribed recordings in LibriSpeech's layout: any/where/ID.flac beside *.trans.txt."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from .errors import ExampleError
from .utterance import Audio, Utterance
from .vocabulary import Vocabulary

# LibriSpeech's own held-out subsets, whichever of them is used.
NEVER_TRAINED = ("dev", "test")


@dataclass(frozen=True)
class Entry:
    """A recording that was not read yet.

    path:    The audio.
    subset:  Folder of the corpus that it is in, as "dev-clean".
    text:    Its transcript.
    seconds: Its duration.
    rate:    Samples per second.
    """

    path: Path
    subset: str
    text: str
    seconds: float
    rate: int


def read_corpus(folder: Path) -> list[Entry]:
    """Every transcribed recording below `folder`, in the order of their names."""
    if not folder.is_dir():
        raise ExampleError(f"--librispeech {folder} is not a folder")
    entries = []
    for transcripts in sorted(folder.rglob("*.trans.txt")):
        subset = transcripts.relative_to(folder).parts[0]
        for line in transcripts.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            path = transcripts.with_name(f"{name}.flac")
            try:
                audio = soundfile.info(path)
            except soundfile.LibsndfileError as error:
                raise ExampleError(f"{path} cannot be read: {error}") from error
            entries.append(Entry(path, subset, text.strip(), audio.duration, audio.samplerate))
    if not entries:
        raise ExampleError(f"--librispeech {folder} has no files named *.trans.txt with recordings")
    rates = {entry.rate for entry in entries}
    if len(rates) > 1:
        raise ExampleError(f"--librispeech {folder} mixes sample rates {sorted(rates)}")
    return entries


def split(entries: list[Entry], held_out: str | float) -> tuple[list[Entry], list[Entry]]:
    """Recordings for training and for test, each in one random order.

    held_out: The test subset's name, or the share of the utterances that are taken for it.
    """
    order = np.random.default_rng(7).permutation(len(entries))
    shuffled = [entries[position] for position in order]
    training = [entry for entry in shuffled if not entry.subset.startswith(NEVER_TRAINED)]
    if isinstance(held_out, str):
        test = [entry for entry in shuffled if entry.subset == held_out]
        training = [entry for entry in training if entry.subset != held_out]
    else:
        count = max(1, round(held_out * len(training)))
        test, training = training[:count], training[count:]
    if not training or not test:
        raise ExampleError(
            f"--held-out {held_out} leaves {len(training)} utterances for training and "
            f"{len(test)} for test"
        )
    return training, test


class LibriSpeech:
    """Recordings read as they are needed, epoch after epoch."""

    def __init__(self, training: list[Entry], test: list[Entry], vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.sample_rate = training[0].rate
        self.seconds = [entry.seconds for entry in training]
        self.test_size = len(test)
        self._training = training
        self._test = test

    def training(self, index: int) -> Utterance:
        """Utterance `index` of an endless row of epochs, in the order of the corpus."""
        return _read(self._training[index % len(self._training)])

    def test(self, index: int) -> Utterance:
        """Utterance `index` of the test split."""
        return _read(self._test[index])


def _read(entry: Entry) -> Utterance:
    audio: Audio
    audio, _ = soundfile.read(entry.path, dtype="float32")
    if audio.ndim != 1 or len(audio) == 0:
        raise ExampleError(f"{entry.path} must be mono and not empty, got shape {audio.shape}")
    return Utterance(audio=audio, text=entry.text, speaker=entry.path.name.partition("-")[0])
