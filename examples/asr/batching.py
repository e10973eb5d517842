"""Which utterances make a batch, in which order, and which process takes which of them.

A batch is the same for any number of processes and a function of seed and step alone, so a run
continues anywhere, on any number of processes, without a position to save but its step.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Buckets of similar durations: with more there is less padding, and less chance in who meets whom.
BUCKETS = 40


class Share(NamedTuple):
    """One process's part of a batch.

    indices: Its utterances.
    total:   Utterances of the whole batch.
    weight:  Makes the sum of its losses, averaged over the processes, the mean over the batch.
    """

    indices: list[int]
    total: int
    weight: float


def share(batch: list[int], part: int, parts: int) -> Share:
    """Part number `part` of a batch; of utterances in order of duration, all parts get alike."""
    indices = batch[part::parts]
    if not indices:
        # Gradients are averaged by all processes: this one computes one without weight.
        return Share(batch[:1], len(batch), 0.0)
    return Share(indices, len(batch), parts / len(batch))


def consecutive(size: int) -> Iterator[list[int]]:
    """Batches [0..size), [size..2*size), ... without end."""
    start = 0
    while True:
        yield list(range(start, start + size))
        start += size


def bucketed(seconds: Sequence[float], limit: float, seed: int) -> Iterator[list[int]]:
    """Batches of similar durations, epoch after epoch without end.

    seconds: Duration of each utterance of an epoch; index i is utterance i % len(seconds).
    limit:   Longest batch in seconds, padding included.
    seed:    With the epoch's number, decides who meets whom and when.
    """
    epoch = 0
    while True:
        first = epoch * len(seconds)
        for batch in _one_epoch(
            np.asarray(seconds), limit, np.random.default_rng((6, seed, epoch))
        ):
            yield [first + int(utterance) for utterance in batch]
        epoch += 1


def _one_epoch(seconds: np.ndarray, limit: float, rng: np.random.Generator) -> Iterator[np.ndarray]:
    order = rng.permutation(len(seconds))
    bucket = np.argsort(np.argsort(seconds)) * BUCKETS // len(seconds)
    # By bucket and in random order within it, then cut wherever a batch is full.
    order = order[np.argsort(bucket[order], kind="stable")]
    cuts, longest = [0], 0.0
    for position, duration in enumerate(seconds[order]):
        longest = max(longest, duration)
        if longest * (position + 1 - cuts[-1]) > limit:
            cuts.append(position)
            longest = duration
    batches = np.split(order, cuts[1:])
    for number in rng.permutation(len(batches)):
        batch = batches[number]
        yield batch[np.argsort(seconds[batch], kind="stable")]
