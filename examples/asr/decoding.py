"""Greedy decoding and its errors."""

from collections.abc import Callable

import jiwer
import torch
from torch import Tensor

from .data import Batch, HeldOut
from .model import Transducer, encoder_lengths
from .vocabulary import BLANK, Vocabulary

MAX_SYMBOLS_PER_FRAME = 3


def greedy_decode(
    encoder: Tensor,
    lengths: Tensor,
    start: Tensor,
    predict: Callable[[Tensor], Tensor],
    joint: Callable[[Tensor, Tensor], Tensor],
) -> list[list[int]]:
    """The most likely label, frame after frame, for all utterances of a batch at once.

    encoder: Encoder frames. [B, T, H]
    lengths: Valid frames of each utterance. [B]
    start:   Label context before the first label. [B, C]
    predict: Label contexts [B, C] to predictor states [B, H].
    joint:   Encoder frames [B, H] and predictor states [B, H] to logits [B, V].

    Returns the labels of each utterance, at most MAX_SYMBOLS_PER_FRAME for each frame.
    """
    context = start
    state = predict(context)
    lengths = lengths.to(encoder.device)
    steps = []
    for frame in range(encoder.shape[1]):
        active = frame < lengths
        for _ in range(MAX_SYMBOLS_PER_FRAME):
            best = joint(encoder[:, frame], state).argmax(-1)
            active = active & (best != BLANK)
            if not active.any():
                break
            steps.append(torch.where(active, best, BLANK))
            shifted = torch.cat([context[:, 1:], best.unsqueeze(1)], dim=1)
            context = torch.where(active.unsqueeze(1), shifted, context)
            state = predict(context)
    if not steps:
        return [[] for _ in range(encoder.shape[0])]
    return [[label for label in row if label != BLANK] for row in torch.stack(steps, 1).tolist()]


@torch.inference_mode()
def transcribe(model: Transducer, vocabulary: Vocabulary, batch: Batch) -> list[str]:
    """Greedy transcripts of a batch, as words."""
    hypotheses = greedy_decode(
        model.encoder(batch.features),
        encoder_lengths(batch.feature_lengths),
        model.predictor.start(len(batch.features), batch.features.device),
        model.predictor.step,
        model.joint.logits,
    )
    return [vocabulary.decode(labels) for labels in hypotheses]


def count_errors(
    model: Transducer, vocabulary: Vocabulary, batches: list[HeldOut]
) -> tuple[int, int]:
    """Substituted, deleted and inserted words, and words spoken."""
    device = next(model.parameters()).device
    errors = words = 0
    for batch, texts in batches:
        aligned = jiwer.process_words(texts, transcribe(model, vocabulary, batch.to(device)))
        errors += aligned.substitutions + aligned.deletions + aligned.insertions
        words += aligned.substitutions + aligned.deletions + aligned.hits
    return errors, words
