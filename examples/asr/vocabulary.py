"""Labels and text: what the model emits, and the words it stands for. Label 0 is always blank."""

import io
from collections.abc import Iterable
from typing import Protocol

import sentencepiece

from .errors import ExampleError

BLANK = 0


class Vocabulary(Protocol):
    """The labels of a corpus."""

    @property
    def size(self) -> int:
        """Number of labels, blank included."""

    def encode(self, text: str) -> list[int]:
        """The labels of a text, none of them blank."""

    def decode(self, labels: Iterable[int]) -> str:
        """The text of labels, as the word error rate reads it."""


class Words:
    """A label for each of a few words: the first word is label 1."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words
        self.size = 1 + len(words)

    def encode(self, text: str) -> list[int]:
        """Words to labels."""
        return [1 + self.words.index(word) for word in text.split()]

    def decode(self, labels: Iterable[int]) -> str:
        """Labels to words."""
        return " ".join(self.words[label - 1] for label in labels)


class Subwords:
    """Pieces of words, as SentencePiece learnt them.

    model: What `learn_subwords` returned.
    """

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = int(self._processor.vocab_size())

    def encode(self, text: str) -> list[int]:
        """Text to the labels of its most probable pieces."""
        return list(self._processor.encode(text))

    def decode(self, labels: Iterable[int]) -> str:
        """Pieces to text."""
        return str(self._processor.decode(list(labels)))


def learn_subwords(texts: Iterable[str], size: int) -> bytes:
    """A SentencePiece unigram model of at most `size` labels; a small corpus yields fewer."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            # SentencePiece's padding is a label that no text has: the blank.
            pad_id=BLANK,
            pad_piece="<blank>",
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ExampleError(f"--vocab-size {size}: {error}") from error
    return model.getvalue()
