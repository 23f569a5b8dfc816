"""Random draws that depend on (seed, task, index) alone: the same on every platform and with every numpy.

The words come from Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose raw
stream numpy keeps fixed. Everything beyond raw words is made here, because numpy's own distributions may change.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

_WORDS = 2**64
_REFILL = 32


class Draws:
    """One stream of draws; every method takes the next words of it."""

    def __init__(self, *address: int | str) -> None:
        """Args: address: what the stream is a function of, e.g. a seed, a task's kind and an index."""
        key = blake2b("/".join(map(str, address)).encode(), digest_size=16).digest()
        self._philox = np.random.Philox(key=int.from_bytes(key, "little"))
        self._ready: list[int] = []

    def words(self, count: int) -> np.ndarray:
        """Raw words: uint64 [count]."""
        return np.asarray(self._philox.random_raw(count), dtype=np.uint64)

    def below(self, bound: int) -> int:
        """One integer in [0, bound), all equally likely."""
        limit = _WORDS - _WORDS % bound
        while True:
            if not self._ready:
                self._ready = self.words(_REFILL).tolist()[::-1]
            word = self._ready.pop()
            if word < limit:  # the words above would favour small remainders
                return word % bound

    def between(self, low: int, high: int) -> int:
        """One integer in [low, high], both included."""
        return low + self.below(high - low + 1)

    def integers(self, bound: int, count: int) -> np.ndarray:
        """Integers in [0, bound), all equally likely, bound <= 2^63: int64 [count]."""
        limit = _WORDS - _WORDS % bound
        words = self.words(count)
        if limit < _WORDS:
            while (refused := words >= np.uint64(limit)).any():
                words[refused] = self.words(int(refused.sum()))
        return (words % np.uint64(bound)).astype(np.int64)

    def bits(self, count: int) -> np.ndarray:
        """Fair bits: uint8 [count]."""
        words = self.words(-(-count // 64)).astype("<u8")  # the order of bits must not depend on the machine
        return np.unpackbits(words.view(np.uint8), count=count)

    def chances(self, probability: float, count: int) -> np.ndarray:
        """True with `probability`, exact to 2^-53: bool [count]."""
        return (self.words(count) >> np.uint64(11)) < np.uint64(int(probability * 2**53))

    def fractions(self, count: int) -> np.ndarray:
        """Uniform in (0, 1]: float64 [count]."""
        return ((self.words(count) >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53

    def order(self, count: int) -> np.ndarray:
        """A permutation of 0..count-1: int64 [count]."""
        return np.argsort(self.words(count))

    def chosen(self, count: int, of: int) -> np.ndarray:
        """`count` different integers in [0, of), in random order: int64 [count]."""
        return self.order(of)[:count]

    def subset(self, count: int, of: int) -> np.ndarray:
        """True at `count` places, all such rows equally likely: bool [of].

        Fair bits, of which the surplus is flipped at random: no place is treated unlike another, so no row of `count`
        is.
        """
        inside = self.bits(of).astype(bool)
        while surplus := int(np.count_nonzero(inside)) - count:
            places = np.flatnonzero(inside if surplus > 0 else ~inside)
            inside[places[self.integers(len(places), abs(surplus))]] = surplus < 0
        return inside
