"""Which document a lane takes next: a keyed permutation per source and epoch, sources mixed by token deficit.

All arithmetic is in integers, so that every machine makes the same choices.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from longspan.data_pipeline.manifest import DocumentEntry
from longspan.errors import UsageError


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens `start` to `stop` of a document; the whole of it unless long documents are cut.

    Attributes:
        document: index into the manifest's documents. number: place among the document's parts, from 0.
    """

    document: int
    number: int
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        """Length, bos and eos included where the part holds them."""
        return self.stop - self.start


def split_document(document: int, num_tokens: int, max_tokens: int | None) -> list[Part]:
    """The document as parts of at most `max_tokens` tokens."""
    size = max_tokens or num_tokens
    return [
        Part(document, number, start, min(start + size, num_tokens))
        for number, start in enumerate(range(0, num_tokens, size))
    ]


class SourceOrder:
    """The parts of one source in a new order each epoch: sorted by a hash keyed with seed, epoch and source."""

    _KEPT_EPOCHS = 8

    def __init__(self, name: str, parts: list[Part], documents: list[DocumentEntry], seed: int) -> None:
        """Args: name: of the source; parts: its parts; documents: the whole manifest's; seed: of the run."""
        self.name = name
        self.parts = parts
        self.num_tokens = sum(part.num_tokens for part in parts)
        self._labels = [f"{documents[part.document].id}\0{part.number}".encode() for part in parts]
        self._seed = seed
        self._orders: dict[int, list[int]] = {}

    def part(self, epoch: int, position: int) -> Part:
        """The part at `position` of `epoch`."""
        if epoch not in self._orders:
            if len(self._orders) >= self._KEPT_EPOCHS:
                self._orders.pop(next(iter(self._orders)))
            key = hashlib.blake2b(f"{self._seed}\0{epoch}\0{self.name}\0".encode(), digest_size=16)
            self._orders[epoch] = sorted(range(len(self.parts)), key=lambda i: (_finish(key, self._labels[i]), i))
        return self.parts[self._orders[epoch][position]]


def _finish(key: hashlib.blake2b, label: bytes) -> bytes:
    hasher = key.copy()
    hasher.update(label)
    return hasher.digest()


def integer_weights(sources: dict[str, int], weights: dict[str, float] | None) -> dict[str, int]:
    """The share of tokens of each source as integers of equal ratio.

    Args:
        sources: tokens per source.
        weights: wanted shares, in any scale; each source's size if None.

    Raises:
        UsageError: a source is unknown, not named, or weights are negative or all zero.
    """
    if weights is None:
        return dict(sources)
    unknown, unnamed = sorted(set(weights) - set(sources)), sorted(set(sources) - set(weights))
    negative = sorted(name for name, weight in weights.items() if not 0 <= weight < float("inf"))
    problems = []
    if unknown:
        problems.append(f"the corpus has no source {', '.join(unknown)}")
    if unnamed:
        problems.append(f"no weight for {', '.join(unnamed)}")
    if negative:
        problems.append(f"not a number from 0 on: {', '.join(f'{name} = {weights[name]}' for name in negative)}")
    if not problems and not any(weights.values()):
        problems.append("all weights are 0")
    if problems:
        raise UsageError(
            f"data.source_weights: {'; '.join(problems)}. "
            f"Give a weight for each of {', '.join(sources)}; 0 leaves one out."
        )
    shares = {name: Fraction(str(weights[name])) for name in sources}
    scale = lcm(*(share.denominator for share in shares.values()))
    return {name: int(share * scale) for name, share in shares.items()}


class SourceMixer:
    """Hands out parts one by one, always from the source that is furthest behind its share of tokens.

    deficit_s = w_s * sum_r(assigned_r) - assigned_s * sum_r(w_r); the largest goes first, ties by order of sources.
    """

    def __init__(self, orders: list[SourceOrder], weights: list[int]) -> None:
        """Args: orders: of the sources; weights: integers, one a source."""
        self._orders = orders
        self._weights = weights
        self._weight_sum = sum(weights)
        self.epochs = [0] * len(orders)
        self.positions = [0] * len(orders)
        self.assigned = [0] * len(orders)

    def copy(self) -> SourceMixer:
        """An independent mixer at the same place."""
        twin = SourceMixer(self._orders, self._weights)
        twin.epochs, twin.positions, twin.assigned = self.epochs[:], self.positions[:], self.assigned[:]
        return twin

    def deficits(self) -> list[int]:
        """How far each source is behind its share, in tokens times the sum of weights."""
        total = sum(self.assigned)
        return [
            weight * total - assigned * self._weight_sum
            for weight, assigned in zip(self._weights, self.assigned, strict=True)
        ]

    def take(self) -> tuple[int, Part]:
        """The next (index of source, part); a source that is through starts its next epoch."""
        deficits = self.deficits()
        candidates = [index for index, weight in enumerate(self._weights) if weight]
        source = max(candidates, key=lambda index: (deficits[index], -index))
        part = self._orders[source].part(self.epochs[source], self.positions[source])
        self.assigned[source] += part.num_tokens
        self.positions[source] += 1
        if self.positions[source] == len(self._orders[source].parts):
            self.epochs[source] += 1
            self.positions[source] = 0
        return source, part
