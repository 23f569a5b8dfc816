"""Manifests of lengths alone, and a plain planner that the real one must equal."""

from __future__ import annotations

import hashlib
from copy import copy
from fractions import Fraction
from itertools import product
from math import lcm
from pathlib import Path

import numpy as np

from longspan.data_pipeline import mixing, trial
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


class PlainPlanner:
    """Walks over steps and lanes as the plan's rules say, with no shortcuts but to forget documents that are read."""

    def __init__(self, lengths, *, seed, lanes, segment_tokens, quantum, boundary, shares, limit):
        self.sources, self.seed, self.size = list(lengths), seed, segment_tokens
        self.edge = quantum if boundary == "pack" else segment_tokens
        self.ahead = max(mixing.LOOKAHEAD_TOKENS, segment_tokens)
        denominator = lcm(*(Fraction(share).denominator for share in shares.values()))
        self.weights = {source: int(share * denominator) for source, share in shares.items()}
        self.parts, index = {source: [] for source in lengths}, 0
        for source, tokens in lengths.items():
            for size in tokens:
                cut = limit or size
                for part, start in enumerate(range(0, size, cut)):
                    self.parts[source].append((index, part, start, min(start + cut, size), f"{source}/{index}"))
                index += 1
        self.orders = {}
        self.free, self.taken = [0] * lanes, dict.fromkeys(lengths, 0)
        self.read, self.open = dict.fromkeys(lengths, 0), []  # whole documents, and (source, start, tokens)

    def part(self, source, ahead=0):
        """A part that the source has next."""
        epoch, place = divmod(self.taken[source] + ahead, len(self.parts[source]))
        if (source, epoch) not in self.orders:
            self.orders[source, epoch] = epoch_order(self.parts[source], source, epoch, self.seed)
        return self.orders[source, epoch][place]

    def counted(self, now, ahead):
        """Tokens of each source that count, `ahead` tokens before they are read; whole documents if not longer."""
        counted = dict(self.read)
        for source, start, size in self.open:
            counted[source] += size if size <= ahead else max(0, min(size, now - start + ahead))
        return counted

    def squares(self, counted):
        """Sum of squared deficits of the sources with a weight."""
        total = sum(counted[source] for source, weight in self.weights.items() if weight)
        whole = sum(self.weights.values())
        return sum((weight * total - counted[s] * whole) ** 2 for s, weight in self.weights.items() if weight)

    def choices(self, lane):
        """The sources with a weight, by least squares."""
        now, found = self.free[lane] // self.size * self.size, []
        counted = self.counted(now, self.ahead)
        for place, source in enumerate(s for s in self.sources if self.weights[s]):
            size = self.part(source)[3] - self.part(source)[2]
            more = size if size <= self.ahead else min(size, now - self.free[lane] + self.ahead)
            found.append((self.squares({**counted, source: counted[source] + more}), place, source))
        return [source for _, _, source in sorted(found)]

    def take(self, lane, source):
        """The lane takes the source's next part; returns (its place in the lane, the part)."""
        place, part = self.free[lane], self.part(source)
        self.taken[source] += 1
        self.open.append((source, place, part[3] - part[2]))
        self.free[lane] = -(-(place + part[3] - part[2]) // self.edge) * self.edge
        return place, part

    def forget(self, now):
        """Documents that are read before `now` count whole in any case."""
        for source, start, size in self.open:
            self.read[source] += size if start + size <= now else 0
        self.open = [row for row in self.open if row[1] + row[2] > now]

    def due(self):
        """The lane that is filled next."""
        return min(range(len(self.free)), key=lambda lane: (self.free[lane] // self.size, lane))

    def best(self, lane):
        """The source that the lane takes."""
        choices, now = self.choices(lane), self.free[lane] // self.size * self.size
        counted = self.counted(now, self.ahead)
        total = sum(counted[source] for source in choices)
        longest = max(self.part(source)[3] - self.part(source)[2] for source in choices)
        if len(choices) == 1 or longest <= self.ahead or total >= trial.TRIED_SHARE * longest:
            return choices[0]
        step, tried = now // self.size, {}
        promising = sorted(choices[: trial._MOST_CANDIDATES], key=self.sources.index)
        for source, keep in product(promising, (False, True)):
            walk = copy(self)
            walk.free, walk.taken, walk.open = self.free[:], dict(self.taken), self.open[:]
            walk.take(lane, source)
            for _ in range(trial._MOST_REFILLS - 1):
                # lanes are walked until one is due so many steps after this one was
                after = walk.due()
                if (walk.free[after] // self.size, after, walk.free[after] % self.size) >= (
                    step + trial._MOST_STEPS,
                    lane,
                    self.free[lane] % self.size,
                ):
                    break
                walk.take(after, source if keep else walk.choices(after)[0])
            tried[source, keep] = walk
        end = max(step + 1, min(walk.free[walk.due()] // self.size for walk in tried.values()))
        times = [step + -(-(end - step) * number // trial._TIMES) for number in range(1, trial._TIMES + 1)]
        return min(tried, key=lambda s: sum(tried[s].squares(tried[s].counted(t * self.size, 0)) for t in times))[0]


def reference_plan(lengths, steps, **settings):
    """Rows (lane, column, document, part, start, stop) of every step, by a plain walk over steps and lanes."""
    planner = PlainPlanner(lengths, **settings)
    held, plan = [[] for _ in planner.free], []
    for step in range(steps):
        now, after = step * planner.size, (step + 1) * planner.size
        planner.forget(now)
        for lane in range(len(held)):
            while planner.free[lane] < after:
                held[lane].append(planner.take(lane, planner.best(lane)))
        rows = []
        for lane, parts in enumerate(held):
            for begin, (document, number, start, stop, _) in parts:
                first, last = max(begin, now), min(begin + stop - start, after)
                if first < last:
                    rows.append((lane, first - now, document, number, start + first - begin, start + last - begin))
        plan.append(rows)
    return plan


def shares_by_size(lengths):
    """Share of tokens of each source by its size, exact."""
    total = sum(sum(tokens) for tokens in lengths.values())
    return {source: Fraction(sum(tokens), total) for source, tokens in lengths.items()}
