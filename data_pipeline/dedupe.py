"""Near-duplicate documents: MinHash signatures of word shingles, and which documents they join.

The signatures are `datasketch`'s, and so are the numbers of bands and rows for a threshold. The bands are joined here
by sorting: `datasketch.MinHashLSH` keeps Python sets that take several kB a document, sorting takes bytes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import numpy as np

from longspan.data_pipeline.corpus_config import DedupeConfig

# Part of every signature that is kept on disk: raise it when a signature of the same text changes.
SIGNATURE_VERSION = 1

_CHUNK_BYTES = 2**22
_CHUNK_SHINGLES = 2**16
_MOST_COMPARED = 64  # within a bucket: thousands of documents with the same boilerplate must not cost their square
_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: any odd number with mixed bits would do
_LETTER_POWERS = np.array([pow(_ODD, place + 1, 2**64) for place in range(64)], dtype=np.uint64)
_WORD_FACTOR = np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)


def _letter_table() -> np.ndarray:
    """Byte -> lower-case letter, digit or part of a longer UTF-8 character; 0 for what separates words."""
    table = np.zeros(256, dtype=np.uint64)
    for byte in range(256):
        if byte >= 0x80 or chr(byte).isalnum() or byte == ord("_"):
            table[byte] = byte + 32 if ord("A") <= byte <= ord("Z") else byte
    return table


_LETTERS = _letter_table()


def shingle_hashes(text: bytes, words: int) -> np.ndarray:
    """Hashes of all runs of `words` words, case and punctuation ignored: uint32 [shingles], sorted, each once.

    A text of fewer words is one shingle, and so is a text without any.
    """
    rest = np.empty(0, dtype=np.uint64)
    found = [np.empty(0, dtype=np.uint32)]
    for chunk in _chunks(text):
        hashes = np.concatenate([rest, _word_hashes(chunk)])
        if len(hashes) >= words:
            found.append(np.unique(_runs(hashes, words)))
            rest = hashes[len(hashes) - words + 1 :]  # a shingle may begin here and end in the next chunk
        else:
            rest = hashes
    shingles = np.unique(np.concatenate(found))
    if len(shingles):
        return shingles
    if len(rest):
        return _runs(rest, len(rest))
    return np.frombuffer(hashlib.blake2b(text, digest_size=4).digest(), dtype="<u4").astype(np.uint32)


def signature(text: bytes, config: DedupeConfig) -> np.ndarray:
    """MinHash of the text's shingles: uint32 [num_perm]; equal places estimate the Jaccard similarity of two texts."""
    from datasketch import MinHash  # brings scipy, which only builds need

    sketch = MinHash(num_perm=config.num_perm, seed=1, hashfunc=_as_it_is, scheme="affine32")
    shingles = shingle_hashes(text, config.shingle_words)
    for start in range(0, len(shingles), _CHUNK_SHINGLES):
        sketch.update_batch(shingles[start : start + _CHUNK_SHINGLES].tolist())
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


def near_duplicates(signatures: np.ndarray, config: DedupeConfig) -> list[list[int]]:
    """Groups of documents that are joined by chains of pairs as similar as `config.threshold`.

    Args:
        signatures: uint32 [documents, num_perm]; may be a memory map.

    Returns:
        Places of the members of each group of two or more, ascending; the groups in order of their first member.
    """
    parents = list(range(len(signatures)))
    for start, stop in _bands(config.threshold, config.num_perm):
        for bucket in _buckets(signatures[:, start:stop]):
            _join(bucket, signatures, config.threshold, parents)
    groups: dict[int, list[int]] = {}
    for place in range(len(parents)):
        groups.setdefault(_root(parents, place), []).append(place)
    return [members for members in groups.values() if len(members) > 1]


@functools.lru_cache(maxsize=8)
def _bands(threshold: float, num_perm: int) -> list[tuple[int, int]]:
    """Which places of a signature form each band: the division with the fewest wrong pairs at this threshold."""
    from datasketch import MinHashLSH

    ranges: list[tuple[int, int]] = MinHashLSH(threshold=threshold, num_perm=num_perm).hashranges
    return ranges


def _chunks(text: bytes) -> Iterator[np.ndarray]:
    """The text in pieces of some megabytes that end between words, so that a long document needs little memory."""
    letters = np.frombuffer(text, dtype=np.uint8)
    start = 0
    while start < len(letters):
        stop = min(start + _CHUNK_BYTES, len(letters))
        while stop < len(letters) and _LETTERS[letters[stop]] and stop < start + 2 * _CHUNK_BYTES:
            stop += 1
        yield _LETTERS[letters[start:stop]]
        start = stop


def _word_hashes(letters: np.ndarray) -> np.ndarray:
    """One hash per word of `letters` (uint64, 0 between words): uint64 [words]."""
    inside = letters != 0
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    starts, stops = edges[::2], edges[1::2]
    if not len(starts):
        return np.empty(0, dtype=np.uint64)
    lengths = stops - starts
    firsts = np.cumsum(lengths) - lengths
    place = np.arange(lengths.sum()) - np.repeat(firsts, lengths)
    hashes = np.add.reduceat(letters[inside] * _LETTER_POWERS[place & 63], firsts)  # modulo 2^64
    return (hashes ^ (hashes >> _SHIFT)) * _WORD_FACTOR


def _runs(hashes: np.ndarray, words: int) -> np.ndarray:
    """Hash of each run of `words` word hashes: uint32 [len(hashes) - words + 1]."""
    count = len(hashes) - words + 1
    runs = np.zeros(count, dtype=np.uint64)
    for place in range(words):
        runs = runs * np.uint64(_ODD) + hashes[place : place + count]
    runs = (runs ^ (runs >> _SHIFT)) * _WORD_FACTOR
    return (runs >> _SHIFT).astype(np.uint32)


def _as_it_is(value: int) -> int:
    return value


def _buckets(band: np.ndarray) -> Iterator[np.ndarray]:
    """Places of the documents that agree in the whole of a band, for every such set of two or more."""
    rows = np.ascontiguousarray(band)
    keys = rows.view([("", rows.dtype)] * rows.shape[1]).reshape(-1)
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
    for bucket in np.split(order, cuts):
        if len(bucket) > 1:
            yield bucket


def _join(bucket: np.ndarray, signatures: np.ndarray, threshold: float, parents: list[int]) -> None:
    """Join the members that are similar over the whole signature; a band alone has false alarms."""
    rows = signatures[bucket]
    places = bucket.tolist()
    for place, member in enumerate(places[:-1]):
        root = _root(parents, member)
        near = range(place + 1, min(place + 1 + _MOST_COMPARED, len(places)))
        others = [other for other in near if _root(parents, places[other]) != root]
        if not others:
            continue
        similarity = (rows[others] == rows[place]).mean(axis=1)
        for other in np.asarray(others)[similarity >= threshold].tolist():
            first, second = sorted((_root(parents, member), _root(parents, places[other])))
            parents[second] = first


def _root(parents: list[int], place: int) -> int:
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = parents[place]
    return place
