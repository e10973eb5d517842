"""From utterances to padded batches, made by background processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import augment_audio, mask_features
from .batching import Share, bucketed, consecutive
from .config import Config
from .errors import ExampleError
from .features import Normalisation, log_mel, measure_normalisation
from .folder import write_whole
from .librispeech import LibriSpeech, read_corpus, split
from .parallel import World
from .recordings import RecordedStrings
from .synthesis import SyntheticStrings
from .utterance import Source
from .vocabulary import Subwords, Vocabulary, learn_subwords

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
        return self._replace(
            features=self.features.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
        )


class Example(NamedTuple):
    """One utterance as the model sees it: features [T, 48] and labels [U]."""

    features: Tensor
    labels: Tensor


class HeldOut(NamedTuple):
    """A batch for evaluation and the words that were spoken in it."""

    batch: Batch
    texts: list[str]


def collate(examples: list[Example]) -> Batch:
    """Pad examples to a batch."""
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        features=pad([example.features for example in examples], batch_first=True),
        feature_lengths=torch.tensor([len(example.features) for example in examples]),
        targets=pad([example.labels for example in examples], batch_first=True),
        target_lengths=torch.tensor([len(example.labels) for example in examples]),
    )


def make_source(config: Config, world: World) -> Source:
    """A corpus or recorded digits when there is a folder of them, otherwise synthesis."""
    if config.librispeech is not None:
        training, test = split(read_corpus(config.librispeech), config.held_out)
        path = config.out / "vocabulary.model"
        if world.rank == 0 and not path.exists():
            texts = (entry.text for entry in training)
            write_whole(path, learn_subwords(texts, config.vocab_size))
        world.wait()
        return LibriSpeech(training, test, Subwords(path.read_bytes()))
    if config.data is not None:
        return RecordedStrings(config.data, config.seed)
    return SyntheticStrings(config.seed, config.test_strings)


def make_batches(source: Source, config: Config) -> Iterator[list[int]]:
    """The utterances of every batch from the first step on, for all processes together."""
    if source.seconds is None:
        return consecutive(config.batch_size)
    longest = max(source.seconds)
    if longest > config.batch_seconds:
        raise ExampleError(
            f"--batch-seconds {config.batch_seconds:g} is less than the longest utterance, "
            f"{longest:.1f} s"
        )
    return bucketed(source.seconds, config.batch_seconds, config.seed)


def training_normalisation(source: Source) -> Normalisation:
    """Feature statistics of the first training utterances."""
    utterances = (source.training(index) for index in range(NORMALISATION_UTTERANCES))
    return measure_normalisation(log_mel(u.audio, source.sample_rate) for u in utterances)


@dataclass(frozen=True)
class TrainingSet(Dataset[tuple[Share, Batch]]):
    """Augmented shares of batches; each utterance is a function of (seed, index) alone."""

    source: Source
    normalisation: Normalisation
    config: Config

    def __getitem__(self, share: Share) -> tuple[Share, Batch]:
        return share, collate([self._example(index) for index in share.indices])

    def _example(self, index: int) -> Example:
        rng = np.random.default_rng((5, self.config.seed, index))
        utterance = self.source.training(index)
        audio = augment_audio(utterance.audio, rng)
        features = self.normalisation(log_mel(audio, self.source.sample_rate))
        features = mask_features(features, self.config.time_mask_frames, rng)
        return _example(features, utterance.text, self.source.vocabulary)


def load(
    dataset: TrainingSet, shares: Iterator[Share], device: torch.device
) -> Iterator[tuple[Share, Batch]]:
    """Each share's batch on `device`, in the same order for any number of workers."""
    workers = dataset.config.workers
    loader = DataLoader(
        dataset,
        batch_size=None,  # what the data set returns is a batch already
        sampler=shares,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=_use_one_thread,
    )
    for share, batch in loader:
        yield share, batch.to(device)


def held_out_batches(
    source: Source, normalisation: Normalisation, config: Config, world: World
) -> list[HeldOut]:
    """This process's share of the test set, unaugmented, in batches of similar lengths."""
    examples = []
    for index in range(world.rank, source.test_size, world.size):
        utterance = source.test(index)
        features = normalisation(log_mel(utterance.audio, source.sample_rate))
        example = _example(features, utterance.text, source.vocabulary)
        examples.append((example, utterance.text))
    examples.sort(key=lambda pair: len(pair[0].features))
    rows = [examples[i : i + config.batch_size] for i in range(0, len(examples), config.batch_size)]
    return [HeldOut(collate([e for e, _ in row]), [text for _, text in row]) for row in rows]


def _example(features: np.ndarray, text: str, vocabulary: Vocabulary) -> Example:
    labels = torch.tensor(vocabulary.encode(text), dtype=torch.int64)
    return Example(torch.from_numpy(features), labels)


def _use_one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
