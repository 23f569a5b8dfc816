"""The parts that lanes take, as columns, and the order in which each source hands them out in every epoch."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from longspan.data_pipeline.document_table import DocumentTable

# splitmix64 (Steele, Lea and Flood, OOPSLA 2014): increment and finaliser.
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_KEPT_ORDER_ELEMENTS = 16_000_000


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


class PartTable:
    """Parts of documents as columns, grouped by source; the parts of source s are `bounds[s]` to `bounds[s + 1]`.

    Attributes:
        sources: names. bounds: S + 1 places. source: int32 [P], index into `sources`.
        document, number, start, stop: int64 [P], as in `Part`. keys: uint64 [P], hashes of (document id, number).
    """

    def __init__(self, documents: DocumentTable, places: np.ndarray, max_document_tokens: int | None) -> None:
        """
        Args:
            documents: of the manifest. places: int [n], ascending, those to use.
            max_document_tokens: longer documents become several parts; None leaves all whole.
        """
        codes = documents.source_index[places]
        present, first = np.unique(codes, return_index=True)
        present = present[np.argsort(first)]
        self.sources = [documents.sources[code] for code in present]
        rank = np.zeros(len(documents.sources), dtype=np.int32)
        rank[present] = np.arange(len(present))
        by_source = np.argsort(rank[codes], kind="stable")
        document = places[by_source]
        lengths = documents.num_tokens[document]
        limit = max_document_tokens or max(1, int(lengths.max(initial=1)))
        counts = -(-lengths // limit)
        self.document = np.repeat(document, counts)
        self.number = np.arange(len(self.document)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.start = self.number * limit
        self.stop = np.minimum(self.start + limit, np.repeat(lengths, counts))
        self.source = np.repeat(rank[codes[by_source]], counts)
        self.bounds = np.searchsorted(self.source, np.arange(len(self.sources) + 1)).tolist()
        self.keys = documents.keys[self.document] + self.number.astype(np.uint64) * _INCREMENT

    def __len__(self) -> int:
        return len(self.document)

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens of each part: int64 [P]."""
        return self.stop - self.start

    def part(self, index: int) -> Part:
        """The part at `index`."""
        columns = (self.document, self.number, self.start, self.stop)
        return Part(*(int(column[index]) for column in columns))

    def extended(self, parts: Iterable[tuple[int, Part]]) -> PartTable:
        """A table with further (source, part) after these; no source's range takes them in."""
        sources, extra = zip(*parts, strict=True)
        table = object.__new__(PartTable)
        table.sources, table.bounds = self.sources, self.bounds
        table.source = np.append(self.source, np.array(sources, dtype=np.int32))
        for name in ("document", "number", "start", "stop"):
            setattr(table, name, np.append(getattr(self, name), [getattr(part, name) for part in extra]))
        table.keys = np.append(self.keys, np.zeros(len(extra), dtype=np.uint64))
        return table


class PartSequence:
    """An order of the parts `first` to `stop` of a table: a new permutation each epoch, or once as they lie.

    The permutation sorts by a 64-bit hash of (seed, epoch, source, document id, part), whose low bits give way to
    the part's place, so that no two are equal and a plain sort of one array gives the order.

    Attributes:
        size: parts in an epoch. is_finite: there is one epoch only. num_tokens: of an epoch.
    """

    def __init__(self, parts: PartTable, first: int, stop: int, *, name: str, seed: int, shuffle: bool) -> None:
        """Args: parts, first, stop: which parts; name: of the source; seed: of the run; shuffle: False: one epoch."""
        self.size, self.is_finite = stop - first, not shuffle
        self._first, self._label, self._seed = first, name, seed
        self._keys = parts.keys[first:stop]
        self._lengths = parts.num_tokens[first:stop]
        self.num_tokens = int(self._lengths.sum())
        self._is_even = self.size > 0 and int(self._lengths.min()) == int(self._lengths.max())
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def remaining(self, taken: int) -> int | None:
        """Parts left after `taken`; None if they never end."""
        return self.size - taken if self.is_finite else None

    def lengths(self, taken: int, count: int) -> np.ndarray:
        """Tokens of parts `taken` to at most `taken + count` in sequence, fewer at an epoch's end: int64 [m]."""
        epoch, place = divmod(taken, self.size)
        if self.is_finite and epoch:
            return self._lengths[:0]
        if self._is_even or self.is_finite:  # the permutation would not change the lengths
            return self._lengths[place : place + count]
        return self._lengths[self._order(epoch)[place : place + count]]

    def parts(self, ordinals: np.ndarray) -> np.ndarray:
        """Index into the table of the parts at these places of the sequence: int64 [m], from int64 [m]."""
        if self.is_finite:
            return self._first + ordinals
        epochs, places = np.divmod(ordinals, self.size)
        indices = np.empty(len(ordinals), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._order(int(epoch))[places[here]]
        return self._first + indices

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            order = self._orders.get(epoch)
            if order is None:
                while self._orders and (len(self._orders) + 1) * self.size > _KEPT_ORDER_ELEMENTS:
                    self._orders.popitem(last=False)
                order = self._orders[epoch] = self._permutation(epoch)
            self._orders.move_to_end(epoch)
            return order

    def _permutation(self, epoch: int) -> np.ndarray:
        label = hashlib.blake2b(f"{self._seed}\0{epoch}\0{self._label}".encode(), digest_size=8).digest()
        place_bits = np.uint64((1 << max(0, self.size - 1).bit_length()) - 1)
        hashes = _mix(self._keys ^ np.uint64(int.from_bytes(label, "little")))
        hashes &= ~place_bits
        hashes |= np.arange(self.size, dtype=np.uint64)
        hashes.sort()
        hashes &= place_bits
        return hashes.astype(np.int32)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> _SHIFTS[0])) * _MULTIPLIERS[0]
    values = (values ^ (values >> _SHIFTS[1])) * _MULTIPLIERS[1]
    mixed: np.ndarray = values ^ (values >> _SHIFTS[2])
    return mixed
