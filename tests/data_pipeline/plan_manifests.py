"""Manifests of lengths alone, and a plain planner that the real one must equal."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path

import numpy as np

from longspan.data_pipeline.document_table import DocumentTable
from longspan.data_pipeline.manifest import Manifest, byte_vocabulary

MASK = (1 << 64) - 1


def manifest_of_columns(num_tokens: np.ndarray, source_index: np.ndarray, names: list[str]) -> Manifest:
    """A manifest with no shards on disk: lengths int [n], place of each document's source in `names` int [n]."""
    digest = hashlib.sha256(np.asarray(num_tokens, np.int64).tobytes() + np.asarray(source_index, np.int64).tobytes())
    table = DocumentTable.synthetic(num_tokens, source_index, names)
    return Manifest(Path("nowhere"), "lengths", byte_vocabulary(), [], [], table, digest.hexdigest())


def manifest_of_lengths(lengths: dict[str, list[int]]) -> Manifest:
    """A manifest with documents of these many tokens per source, and no shards on disk."""
    source = np.repeat(np.arange(len(lengths)), [len(tokens) for tokens in lengths.values()])
    return manifest_of_columns(np.concatenate(list(lengths.values())), source, list(lengths))


def _mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def epoch_order(parts, source, epoch, seed):
    """The parts (document, number, start, stop, id) of a source in the order of an epoch."""
    label = hashlib.blake2b(f"{seed}\0{epoch}\0{source}".encode(), digest_size=8).digest()
    bits = (len(parts) - 1).bit_length()

    def key(place):
        document_key = int.from_bytes(hashlib.blake2b(parts[place][4].encode()).digest()[:8], "little")
        part_key = document_key + parts[place][1] * 0x9E3779B97F4A7C15 & MASK
        return _mix(part_key ^ int.from_bytes(label, "little")) >> bits, place

    return [parts[place] for place in sorted(range(len(parts)), key=key)]


def reference_plan(lengths, steps, *, seed, lanes, segment_tokens, quantum, boundary, shares, limit, lookahead):
    """Rows (lane, column, document, part, start, stop) of every step, by a plain walk over steps and lanes."""
    parts, index = {source: [] for source in lengths}, 0
    for source, tokens in lengths.items():
        for size in tokens:
            cut = limit or size
            for part, start in enumerate(range(0, size, cut)):
                parts[source].append((index, part, start, min(start + cut, size), f"{source}/{index}"))
            index += 1
    edge = quantum if boundary == "pack" else segment_tokens
    queues, epochs, taken = {s: [] for s in lengths}, dict.fromkeys(lengths, 0), {s: [] for s in lengths}
    held, free, plan = [[] for _ in range(lanes)], [0] * lanes, []
    for step in range(steps):
        now = step * segment_tokens
        for lane in range(lanes):
            while free[lane] < now + segment_tokens:
                counted = {
                    s: sum(n if n <= lookahead else min(n, now - start + lookahead) for start, n in taken[s])
                    for s in lengths
                }
                total = sum(counted.values())
                source = max((s for s in lengths if shares[s]), key=lambda s: shares[s] * total - counted[s])
                if not queues[source]:
                    queues[source] = epoch_order(parts[source], source, epochs[source], seed)[::-1]
                    epochs[source] += 1
                part = queues[source].pop()
                held[lane].append((free[lane], part))
                taken[source].append((free[lane], part[3] - part[2]))
                free[lane] = -(-(free[lane] + part[3] - part[2]) // edge) * edge
        rows = []
        for lane in range(lanes):
            for begin, (document, number, start, stop, _) in held[lane]:
                first, last = max(begin, now), min(begin + stop - start, now + segment_tokens)
                if first < last:
                    rows.append((lane, first - now, document, number, start + first - begin, start + last - begin))
        plan.append(rows)
    return plan


def shares_by_size(lengths):
    """Share of tokens of each source by its size, exact."""
    total = sum(sum(tokens) for tokens in lengths.values())
    return {source: Fraction(sum(tokens), total) for source, tokens in lengths.items()}
