"""Philox4x32-10: random numbers that are a function of (seed, index) and of nothing else.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

_ROUNDS = 10
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
# What is added to the two words of the key before each round, modulo 2**32.
_KEY_STEPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)


def philox(counters: UInt64, keys: UInt64) -> UInt64:
    """Random 32-bit words of many counters at once. Shapes: counters ``[4, n]``, keys ``[2, n]`` → ``[4, n]``."""
    round_keys = (keys + _KEY_STEPS) & _WORD
    even, odd = counters[0::2], counters[1::2]
    for key in round_keys:
        product = even * _MULTIPLIERS
        even = (product >> _HALF)[::-1] ^ odd ^ key
        odd = (product & _WORD)[::-1]
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each (seed, index). A seed counts modulo 2**64."""
    seed = np.array([s & (2**64 - 1) for s in seeds], np.uint64)
    counters = np.zeros((4, len(seed)), np.uint64)
    counters[0] = np.array(indices, np.uint64)
    words = philox(counters, np.stack([seed & _WORD, seed >> _HALF]))
    bits: UInt64 = (words[0] | words[1] << _HALF) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
