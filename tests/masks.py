"""Which hidden states dropout keeps, by a generator that is written out in Python's integers."""

from __future__ import annotations

import functools

from rnnt_op.backends.records import Dropout


@functools.cache
def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10, as its paper has it."""
    left_0, right_0, left_1, right_1 = counter
    key_0, key_1 = key
    for _ in range(10):
        high_0, low_0 = divmod(left_0 * 0xD2511F53, 2**32)
        high_1, low_1 = divmod(left_1 * 0xCD9E8D57, 2**32)
        left_0, right_0 = high_1 ^ right_0 ^ key_0, low_1
        left_1, right_1 = high_0 ^ right_1 ^ key_1, low_0
        key_0, key_1 = (key_0 + 0x9E3779B9) % 2**32, (key_1 + 0xBB67AE85) % 2**32
    return left_0, right_0, left_1, right_1


def is_kept(dropout: Dropout, node: tuple[int, int, int], h: int) -> bool:
    b, t, u = node
    seed = int(dropout.seed)
    word = philox((h // 4, u, t, b), (seed % 2**32, seed // 2**32 % 2**32))[h % 4]
    return word >= round(dropout.probability * 2**32)
