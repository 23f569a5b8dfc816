"""Regular and counter languages: parity, (aa)*, (abab)*, a^n b^n, a^n b^n c^n.

Labels as in Bhattamishra et al., "On the Ability and Limitations of Transformers to Recognize Formal Languages",
arXiv:2009.11264: what holds, or what may follow, after each symbol.

Traps avoided:
- a parity string that gets a last 1 whenever its count is odd is always even: here all bits are fair and none is added;
- (aa)*, (abab)* and a^n b^n have one string for each length or n, so a test inside the training lengths measures
  memory: here the length decides the split;
- bounds on n let a^n b^n c^n grow to three times the length: here bounds are on the symbols;
- odd prefixes of (abab)* are told apart by their last symbol: here all asked prefixes end alike;
- answers are equally often each of those that their lengths allow.
"""

from __future__ import annotations

import numpy as np

from longspan.data_pipeline.synthetic.config import LanguageConfig, UnaryConfig
from longspan.data_pipeline.synthetic.draws import Draws
from longspan.data_pipeline.synthetic.samples import Sample, labelled

_NO_YES = (b"n", b"y")


def draw_parity(config: LanguageConfig, draws: Draws) -> Sample:
    """Fair bits; label 1 while the number of 1s so far is even. Answer `e` for even or `o` for odd."""
    bits = draws.bits(draws.between(*config.lengths))
    labels = 1 - (np.cumsum(bits, dtype=np.int64) & 1)
    return labelled((bits + ord("0")).tobytes(), labels, (b"o", b"e")[int(labels[-1])], (b"e", b"o"))


def draw_repeated(config: UnaryConfig, draws: Draws) -> Sample:
    """aaaa... or abab...; label 1 where the prefix is in (aa)* or (abab)*. Answer `y` or `n`.

    A prefix of abab... is asked about after a `b` only: after an `a` the answer would be plain to see.
    """
    period = 2 if config.kind == "aa_star" else 4
    step = period // 2
    first, last = -(-config.lengths[0] // step), config.lengths[1] // step
    inside = draws.below(2) if first < last else 1 - first % 2
    halves = first if first % 2 == 1 - inside else first + 1
    size = step * (halves + 2 * draws.below((last - halves) // 2 + 1))
    labels = (np.arange(1, size + 1) % period == 0).astype(np.int16)
    symbols = b"a" * size if period == 2 else b"ab" * (size // 2)
    return labelled(symbols, labels, _NO_YES[int(labels[-1])], (b"n", b"y"))


def draw_counter(config: UnaryConfig, draws: Draws) -> Sample:
    """A prefix of a^n b^n or a^n b^n c^n; label: which symbol must follow.

    0 = `a` or `b` may, 1 = `b`, 2 = `c`, 3 = the string is complete. Answers `a`, `b`, `c` and `.`.
    """
    letters = 2 if config.kind == "a_n_b_n" else 3
    low, high = config.lengths
    count = draws.between(-(-low // letters), max(high // letters, -(-low // letters)))
    word = b"".join(letter * count for letter in (b"a", b"b", b"c")[:letters])
    follows = np.repeat(np.arange(letters), count)
    follows[count * np.arange(2, letters + 1) - 1] += 1  # the last of its letter: the next one must come
    follows[-1] = 3
    return cut(draws, word[:high], follows[:high], low, (b"a", b"b", b"c", b"."))


def cut(draws: Draws, word: bytes, labels: np.ndarray, low: int, answers: tuple[bytes, ...]) -> Sample:
    """A prefix of `word` of at least `low` symbols that ends at a label drawn fairly from those that occur there.

    Args:
        labels: [len(word)], from 0; `answers` writes them out.
    """
    late = labels[low - 1 :]
    present = np.flatnonzero(np.bincount(late, minlength=len(answers)))
    places = np.flatnonzero(late == present[draws.below(len(present))])
    stop = low + int(places[draws.below(len(places))])
    return labelled(word[:stop], labels[:stop], answers[int(labels[stop - 1])], answers)
