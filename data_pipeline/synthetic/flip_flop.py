"""Flip-flop: one bit of memory among distracting bits (Liu et al., "Exposing Attention Glitches with Flip-Flop Language
Modeling", arXiv:2306.00946).

Traps avoided: strings of all sets are kept apart by hash, so nothing selected on a validation set has seen a test
string; only the bit after `r` is scored; no symbol is a padding symbol, whose embedding would stay frozen; read errors
are for `scoring.interval`, which does not round a long tail away.
"""

from __future__ import annotations

import numpy as np

from longspan.data_pipeline.synthetic.config import FlipFlopConfig
from longspan.data_pipeline.synthetic.draws import Draws
from longspan.data_pipeline.synthetic.samples import Sample

_LETTERS = np.frombuffer(b"wri", dtype=np.uint8)


def draw_flip_flop(config: FlipFlopConfig, draws: Draws) -> Sample:
    """Instruction and bit by turns, `w` first, `r` last: `w0i1r0`.

    The bit after `w` goes to memory, the bit after `r` is the memory (an answer), the bit after `i` means nothing.
    """
    count = draws.between(*config.instructions)
    kinds = np.where(draws.chances(config.ignore_probability, count), 2, draws.bits(count))
    kinds[0], kinds[-1] = 0, 1
    bits = draws.bits(count)
    last_write = np.maximum.accumulate(np.where(kinds == 0, np.arange(count), 0))
    bits = np.where(kinds == 1, bits[last_write], bits)
    text = np.empty((count, 2), dtype=np.uint8)
    text[:, 0], text[:, 1] = _LETTERS[kinds], bits + ord("0")
    reads = 2 * np.flatnonzero(kinds == 1) + 1
    return Sample(text.tobytes(), np.stack([reads, reads + 1], axis=1), count, choices=(b"0", b"1"))
