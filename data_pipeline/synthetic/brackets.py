"""Bracket languages: Dyck-n, shuffle-2 and Dyck-1 with resets.

Labels: which brackets may be closed after each symbol (Bhattamishra et al., arXiv:2009.11264; reset-Dyck: Irie et al.,
"Practical Computational Power of Linear Transformers and Their Recurrent and Self-Referential Extensions",
arXiv:2310.16076).

Traps avoided:
- a grammar that is sampled until a string is short enough gives mostly tiny ones: here every length is equally likely
  and the bracket structure is uniform over all of that length (cycle lemma);
- a shuffle drawn from a grammar with two types never crosses: here two words are interleaved, so `([)]` occurs;
- a reset at depth 0 tests nothing: here a bracket is always open before a reset; and the string keeps to its upper
  bound;
- a whole word always ends with nothing to close: here a prefix is asked about, each answer that occurs equally often.
"""

from __future__ import annotations

import numpy as np

from longspan.data_pipeline.synthetic.config import DyckConfig, LanguageConfig, ResetDyckConfig
from longspan.data_pipeline.synthetic.draws import Draws
from longspan.data_pipeline.synthetic.languages import cut
from longspan.data_pipeline.synthetic.samples import Sample

_OPEN = np.frombuffer(b"([{<", dtype=np.uint8)
_CLOSED = np.frombuffer(b")]}>", dtype=np.uint8)


def draw_dyck(config: DyckConfig, draws: Draws) -> Sample:
    """Label: 0 where nothing is open, else 1 + the type of the innermost open bracket. Answer: it, closed, or `.`."""
    steps = balanced(draws, _pairs(draws, config))
    opening = steps == 1
    depth = np.cumsum(steps, dtype=np.int32)
    types = np.empty(len(steps), dtype=np.uint8)
    types[opening] = draws.integers(config.bracket_types, len(steps) // 2)
    # at each level brackets open and close by turns
    by_level = _stable_order(depth + ~opening)
    types[by_level[1::2]] = types[by_level[::2]]
    word = np.where(opening, _OPEN[types], _CLOSED[types]).tobytes()
    # the innermost open bracket is the last one that was opened to the depth after this place
    by_depth = _stable_order(depth)
    opened = np.maximum.accumulate(np.where(opening[by_depth], np.arange(len(steps), dtype=np.int32), 0))
    labels = np.empty(len(steps), dtype=np.uint8)
    labels[by_depth] = 1 + types[by_depth][opened]
    labels[depth == 0] = 0
    answers = (b".", b")", b"]", b"}", b">")[: config.bracket_types + 1]
    return _within(draws, word, labels, config, answers)


def _stable_order(levels: np.ndarray) -> np.ndarray:
    # numpy sorts one- and two-byte integers by radix, in linear time
    return np.argsort(levels.astype(np.min_scalar_type(int(levels.max()))), kind="stable")


def draw_shuffle(config: LanguageConfig, draws: Draws) -> Sample:
    """Two interleaved words, of () and of []. Label: 1 if `)` may follow, plus 2 if `]` may.

    Answer `.` for none, `)`, `]`, or `*` for both.
    """
    halves = _pairs(draws, config)
    first = draws.between(1, halves - 1) if halves > 1 else draws.below(2)
    of_first = draws.subset(2 * first, 2 * halves)
    steps = np.zeros((2, 2 * halves), dtype=np.int8)
    steps[0, of_first] = balanced(draws, first)
    steps[1, ~of_first] = balanced(draws, halves - first)
    types = (~of_first).astype(np.uint8)
    word = np.where(steps[0] + steps[1] == 1, _OPEN[types], _CLOSED[types]).tobytes()
    open_ones = np.cumsum(steps, axis=1, dtype=np.int32) > 0
    return _within(draws, word, open_ones[0] + np.uint8(2) * open_ones[1], config, (b".", b")", b"]", b"*"))


def draw_reset_dyck(config: ResetDyckConfig, draws: Draws) -> Sample:
    """Brackets with `1` as reset. Label: 1 while a bracket opened since the last reset is open. Answer `)` or `.`."""
    low, high = config.lengths
    length = draws.between(low, high)
    # before each reset at least one bracket and the reset; after the last one at least a pair
    spare = length - 2 * config.resets - 2
    edges = sorted(draws.below(spare + 1) for _ in range(config.resets))
    parts: list[np.ndarray] = []
    for shorter, longer in zip([0, *edges], edges, strict=False):
        rest = longer - shorter
        parts += [np.ones(1, dtype=np.int8), balanced(draws, rest)[:rest], np.zeros(1, dtype=np.int8)]
    rest = spare - edges[-1] + 2
    parts.append(balanced(draws, -(-rest // 2))[:rest])
    steps = np.concatenate(parts)
    symbols = np.frombuffer(b")1(", dtype=np.uint8)[steps + 1].tobytes()
    open_now = np.concatenate([np.cumsum(part, dtype=np.int32) > 0 for part in _since_resets(steps)]).astype(np.uint8)
    last_reset = int(np.flatnonzero(steps == 0)[-1])
    return cut(draws, symbols, open_now, max(low, last_reset + 1), (b".", b")"))


def _since_resets(steps: np.ndarray) -> list[np.ndarray]:
    return np.split(steps, np.flatnonzero(steps == 0))


def balanced(draws: Draws, pairs: int) -> np.ndarray:
    """+1 and -1 of a balanced word, uniform over all words of so many pairs: int8 [2 * pairs].

    Cycle lemma (Dvoretzky and Motzkin 1947): of the rotations of a row with one -1 too many, exactly one stays at 0 or
    above before its last step.
    """
    row = np.where(draws.subset(pairs, 2 * pairs + 1), np.int8(1), np.int8(-1))
    start = int(np.argmin(np.cumsum(row, dtype=np.int32))) + 1
    return np.concatenate([row[start:], row[:start]])[:-1]


def _pairs(draws: Draws, config: DyckConfig | LanguageConfig) -> int:
    """Half the length of a word that reaches a drawn length; the longest may have one symbol too many."""
    low, high = config.lengths
    return draws.between(-(-low // 2), -(-high // 2))


def _within(
    draws: Draws, word: bytes, labels: np.ndarray, config: DyckConfig | LanguageConfig, answers: tuple[bytes, ...]
) -> Sample:
    low, high = config.lengths
    return cut(draws, word[:high], labels[:high], low, answers)
