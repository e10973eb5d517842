"""Greedy decoding and the word error rate."""

from collections.abc import Callable

import jiwer
import torch
from torch import Tensor

from .data import Batch
from .model import Transducer, encoder_lengths
from .vocabulary import BLANK, labels_to_text

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
def transcribe(model: Transducer, batch: Batch) -> list[str]:
    """Greedy transcripts of a batch, as words."""
    hypotheses = greedy_decode(
        model.encoder(batch.features),
        encoder_lengths(batch.feature_lengths),
        model.predictor.start(len(batch.features), batch.features.device),
        model.predictor.step,
        model.joint.logits,
    )
    return [labels_to_text(labels) for labels in hypotheses]


def references(batch: Batch) -> list[str]:
    """The words that were spoken."""
    rows = zip(batch.targets.tolist(), batch.target_lengths.tolist(), strict=True)
    return [labels_to_text(labels[:length]) for labels, length in rows]


def word_error_rate(model: Transducer, batches: list[Batch]) -> float:
    """Substitutions, deletions and insertions per word spoken."""
    model.eval()
    hypotheses = [text for batch in batches for text in transcribe(model, batch)]
    model.train()
    return float(jiwer.wer([text for batch in batches for text in references(batch)], hypotheses))
