"""Copying and multi-query associative recall (Arora et al., "Zoology", arXiv:2312.04927).

Traps avoided:
- filler from the whole vocabulary can equal a key and then stands before a wrong value: here keys are capitals, values
  small letters and filler digits;
- a value that several keys share hides mistakes: here all values of a sample differ.
"""

from __future__ import annotations

import numpy as np

from longspan.data_pipeline.synthetic.config import CopyConfig, RecallConfig
from longspan.data_pipeline.synthetic.draws import Draws
from longspan.data_pipeline.synthetic.samples import Sample, asked_last

_WORDS = 26 * 26


def _two_letters(numbers: np.ndarray, first: bytes) -> np.ndarray:
    """Words of two letters of an alphabet that begins at `first`: uint8 [len(numbers), 2]."""
    return (np.stack([numbers // 26, numbers % 26], axis=1) + first[0]).astype(np.uint8)


def draw_recall(config: RecallConfig, draws: Draws) -> Sample:
    """Pairs `ABxy`, then each key once more with its value (an answer) among filler; size = tokens of two bytes.

    A key comes back at slot g of the two-token slots after the pairs, with P(g) ~ g^(power - 1), no slot twice.
    """
    pairs, slots = config.pairs, (config.tokens - 2 * config.pairs) // 2
    table = np.empty((pairs, 4), dtype=np.uint8)
    table[:, :2] = _two_letters(draws.chosen(pairs, _WORDS), b"A")
    table[:, 2:] = _two_letters(draws.chosen(pairs, _WORDS), b"a")
    # The smallest of exponential times with rates w are a weighted draw without replacement. Only their order counts,
    # so that the last digit of a platform's logarithm does not.
    times = -np.log(draws.fractions(slots)) * np.arange(1, slots + 1) ** (1 - config.power)
    asked = np.argsort(times, kind="stable")[:pairs]
    rows = (draws.integers(10, 4 * slots) + ord("0")).astype(np.uint8).reshape(slots, 4)
    rows[asked] = table
    starts = 4 * pairs + 4 * np.sort(asked) + 2
    text = table.tobytes() + rows.tobytes()
    return Sample(text, np.stack([starts, starts + 2], axis=1), config.tokens)


def draw_copy(config: CopyConfig, draws: Draws) -> Sample:
    """Random letters, `=`, the same letters (the answer); size = letters."""
    size = draws.between(*config.lengths)
    letters = (draws.integers(config.letters, size) + ord("a")).astype(np.uint8).tobytes()
    return asked_last(letters, letters, size)
