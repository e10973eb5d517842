"""Labels and words: label 0 is blank, label d + 1 is digit d."""

from collections.abc import Iterable

BLANK = 0
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCAB_SIZE = 1 + len(WORDS)
STRING_LENGTHS = (2, 7)
# Training starts with the shortest strings and allows a digit more each time this many were
# made: a transducer learns to align short strings sooner.
STRINGS_PER_LENGTH = 1_500


def digits_to_labels(digits: Iterable[int]) -> list[int]:
    """Digits 0-9 to labels 1-10."""
    return [digit + 1 for digit in digits]


def labels_to_text(labels: Iterable[int]) -> str:
    """Labels 1-10 to words, as the word error rate reads them."""
    return " ".join(WORDS[label - 1] for label in labels)


def digits_to_text(digits: Iterable[int]) -> str:
    """Digits 0-9 to words, as a synthesiser or the word error rate reads them."""
    return " ".join(WORDS[digit] for digit in digits)


def longest_string(index: int) -> int:
    """Digits in the longest training string at position `index` of the training set."""
    shortest, longest = STRING_LENGTHS
    return min(longest, shortest + index // STRINGS_PER_LENGTH)
