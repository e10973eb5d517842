"""Strings of digits: their words, and how long they are."""

from collections.abc import Iterable

from .vocabulary import Words

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = Words(WORDS)
STRING_LENGTHS = (2, 7)
# Training starts with the shortest strings and allows a digit more each time this many were
# made: a transducer learns to align short strings sooner.
STRINGS_PER_LENGTH = 1_500


def digits_to_text(digits: Iterable[int]) -> str:
    """Digits 0-9 to words, as a synthesiser or the word error rate reads them."""
    return " ".join(WORDS[digit] for digit in digits)


def longest_string(index: int) -> int:
    """Digits in the longest training string at position `index` of the training set."""
    shortest, longest = STRING_LENGTHS
    return min(longest, shortest + index // STRINGS_PER_LENGTH)
