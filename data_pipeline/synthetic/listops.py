"""ListOps: nested MIN, MAX, MED and SM (sum modulo 10) over digits (Nangia and Bowman 2018, arXiv:1804.06028; sizes:
Long Range Arena, arXiv:2011.04006).

Traps avoided:
- the public generator is unseeded and walks a set, so no two runs agree: here all draws come from (seed, index);
- it throws most trees away to keep a range of lengths: here the length is drawn first and split from the root down;
- answers that follow the operators' own skew are guessed well above 10%: here all ten digits are equally often right.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from longspan.data_pipeline.synthetic.config import ListOpsConfig
from longspan.data_pipeline.synthetic.draws import Draws
from longspan.data_pipeline.synthetic.samples import Sample, asked_last

_DIGITS = tuple(str(digit).encode() for digit in range(10))
_OPERATORS = (b"[MIN", b"[MAX", b"[MED", b"[SM")
_SMALLEST = 4  # length of an operator with two digits: an operator counts two, for itself and its closing bracket
_FILLINGS = 32  # digits tried at once in one tree, so that the wanted value is nearly always among its values


class _TooDeep(Exception):
    """The drawn tree does not fit into the allowed depth."""


def draw_listops(config: ListOpsConfig, draws: Draws) -> Sample:
    """One expression; size = digits plus two for each operator. Answer: its value, a digit."""
    wanted = draws.below(10)
    while True:
        length = draws.between(*config.lengths)
        tokens: list[bytes | int] = []
        digits = draws.integers(10, length * _FILLINGS).reshape(length, _FILLINGS)
        try:
            values = _grow(config, draws, length, config.max_depth, tokens, iter(enumerate(digits)))
        except _TooDeep:
            continue
        right = np.flatnonzero(values == wanted)
        if len(right):
            filling = digits[:, right[0]].tolist()
            words = [_DIGITS[filling[token]] if isinstance(token, int) else token for token in tokens]
            return asked_last(b" ".join(words), _DIGITS[wanted], length, _DIGITS)


def _grow(
    config: ListOpsConfig,
    draws: Draws,
    length: int,
    depth: int,
    tokens: list[bytes | int],
    digits: Iterator[tuple[int, np.ndarray]],
) -> np.ndarray:
    """Append an expression of exactly `length` to `tokens`; returns its value in each filling: int64 [fillings].

    Args:
        depth: operators that may still be inside each other.
        tokens: a digit stands as the number of its row.
        digits: rows that are not used yet, each a digit for each filling.
    """
    if length == 1:
        row, filled = next(digits)
        tokens.append(row)
        return filled
    operator = draws.below(4)
    tokens.append(_OPERATORS[operator])
    parts = _divide(draws, length - 2, config.max_arguments, depth)
    values = np.stack([_grow(config, draws, part, depth - 1, tokens, digits) for part in parts])
    tokens.append(b"]")
    if operator == 0:
        return np.asarray(values.min(axis=0))
    if operator == 1:
        return np.asarray(values.max(axis=0))
    if operator == 3:
        return np.asarray(values.sum(axis=0) % 10)
    values.sort(axis=0)
    return np.asarray((values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2)


def _divide(draws: Draws, length: int, max_arguments: int, depth: int) -> list[int]:
    """Lengths of an operator's arguments, `length` in all: 1 is a digit, 4 or more another operator.

    Raises:
        _TooDeep: they would need operators below the last allowed depth.
    """
    # arguments start as digits; what is left over goes to those that become operators, at least 3 more each
    counts = [
        count
        for count in range(2, min(max_arguments, length) + 1)
        if length == count or (length - count >= _SMALLEST - 1 and depth > 1)
    ]
    if not counts:
        raise _TooDeep
    count = counts[draws.below(len(counts))]
    spare = length - count
    if not spare:
        return [1] * count
    operators = draws.between(1, min(count, spare // (_SMALLEST - 1)))
    spare -= operators * (_SMALLEST - 1)
    edges = sorted(draws.below(spare + 1) for _ in range(operators - 1))
    sizes = [_SMALLEST + stop - start for start, stop in zip([0, *edges], [*edges, spare], strict=True)]
    parts = [1] * count
    for size, place in zip(sizes, draws.chosen(operators, count).tolist(), strict=True):
        parts[place] = size
    return parts
