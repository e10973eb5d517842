"""From utterances to padded batches, made by background processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import augment_audio, mask_features
from .config import Config
from .features import Normalisation, log_mel, measure_normalisation
from .recordings import RecordedStrings
from .synthesis import SyntheticStrings
from .utterance import Source
from .vocabulary import digits_to_labels

NORMALISATION_UTTERANCES = 100


class Batch(NamedTuple):
    """Padded utterances; lengths are int64 and stay on the CPU.

    features:        Normalised log-mel, zero beyond each length. [B, T, 48]
    feature_lengths: Frames of each utterance. [B]
    targets:         Labels, blank beyond each length. [B, U]
    target_lengths:  Labels of each utterance. [B]
    """

    features: Tensor
    feature_lengths: Tensor
    targets: Tensor
    target_lengths: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch with its features and targets on `device`."""
        return self._replace(features=self.features.to(device), targets=self.targets.to(device))


class Example(NamedTuple):
    """One utterance as the model sees it: features [T, 48] and labels [U]."""

    features: Tensor
    labels: Tensor


def collate(examples: list[Example]) -> Batch:
    """Pad examples to a batch."""
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        features=pad([example.features for example in examples], batch_first=True),
        feature_lengths=torch.tensor([len(example.features) for example in examples]),
        targets=pad([example.labels for example in examples], batch_first=True),
        target_lengths=torch.tensor([len(example.labels) for example in examples]),
    )


def make_source(config: Config) -> Source:
    """Recordings when there is a folder of them, otherwise synthesis."""
    if config.data is None:
        return SyntheticStrings(config.seed, config.test_strings)
    return RecordedStrings(config.data, config.seed)


def training_normalisation(source: Source) -> Normalisation:
    """Feature statistics of the first training utterances."""
    utterances = (source.training(index) for index in range(NORMALISATION_UTTERANCES))
    return measure_normalisation(log_mel(u.audio, source.sample_rate) for u in utterances)


@dataclass(frozen=True)
class TrainingSet(Dataset[Example]):
    """Augmented training examples, each a function of (seed, index) alone."""

    source: Source
    normalisation: Normalisation
    seed: int

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng((5, self.seed, index))
        utterance = self.source.training(index)
        audio = augment_audio(utterance.audio, rng)
        features = mask_features(self.normalisation(log_mel(audio, self.source.sample_rate)), rng)
        return _example(features, utterance.digits)


def training_batches(dataset: TrainingSet, config: Config, device: torch.device) -> Iterator[Batch]:
    """Endless batches of fresh strings, in the same order for any number of workers."""
    size = config.batch_size
    loader = DataLoader(
        dataset,
        batch_sampler=_ConsecutiveIndices(size),
        collate_fn=collate,
        num_workers=config.workers,
        prefetch_factor=8 if config.workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=_use_one_thread,
    )
    for batch in loader:
        yield batch.to(device)


def test_batches(
    source: Source, normalisation: Normalisation, batch_size: int, device: torch.device
) -> list[Batch]:
    """The whole test set, unaugmented, in batches of similar lengths."""
    examples = []
    for index in range(source.test_size):
        utterance = source.test(index)
        features = normalisation(log_mel(utterance.audio, source.sample_rate))
        examples.append(_example(features, utterance.digits))
    examples.sort(key=lambda example: len(example.features))
    starts = range(0, len(examples), batch_size)
    return [collate(examples[start : start + batch_size]).to(device) for start in starts]


def _example(features: np.ndarray, digits: tuple[int, ...]) -> Example:
    return Example(torch.from_numpy(features), torch.tensor(digits_to_labels(digits)))


class _ConsecutiveIndices:
    """Index lists [0..size), [size..2*size), ... without end."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        while True:
            yield list(range(start, start + self.size))
            start += self.size


def _use_one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
