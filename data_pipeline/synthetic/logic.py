"""Logical inference: two propositional formulas and which of seven relations holds between them (Bowman, Manning and
Potts, "Tree-structured composition in neural networks without tree-structured architectures", arXiv:1506.04834).

Traps avoided:
- independence is by far the most frequent relation of two random formulas: here the relation is drawn first;
- pairs rewritten into the wanted relation carry traces of the rewriting: here both are drawn blindly and matched by
  truth table;
- tautologies and contradictions fit several relations at once: here they are left out, so that one alone holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longspan.data_pipeline.synthetic.config import LogicConfig
from longspan.data_pipeline.synthetic.draws import Draws
from longspan.data_pipeline.synthetic.samples import Sample, asked_last

VARIABLES = 6
_USED = 4  # of them in one pair, else longer formulas are almost never related
_ROWS = 2**VARIABLES
_ALL = 2**_ROWS - 1
_POOL = 24  # formulas drawn at a time for each side; all their pairs are looked at
_ROUNDS = 8
RELATIONS = (b"=", b"<", b">", b"^", b"|", b"v", b"#")


def _column(variable: int) -> int:
    """Truth table of a variable: bit `row` says whether it holds in this row."""
    return sum(1 << row for row in range(_ROWS) if row >> variable & 1)


_COLUMNS = tuple(_column(variable) for variable in range(VARIABLES))


@dataclass(frozen=True)
class _Formula:
    text: bytes
    table: int


def draw_logic(config: LogicConfig, draws: Draws) -> Sample:
    """`formula : formula` and the relation; size = operators of the longer formula.

    Answers: `=` equivalent, `<` the first implies the second, `>` the reverse, `^` exactly one holds, `|` never both,
    `v` always one, `#` none of these. Each is drawn equally often; sizes at which a relation is hardly ever met (none
    but `=` and `#` without operators) have it less often.
    """
    while True:
        wanted = draws.below(len(RELATIONS))
        for _ in range(_ROUNDS):
            size = draws.between(*config.operators)
            pair = _pair(draws, wanted, size)
            if pair:
                left, right = pair
                return asked_last(left.text + b" : " + right.text, RELATIONS[wanted], size, RELATIONS)


def _pair(draws: Draws, wanted: int, size: int) -> tuple[_Formula, _Formula] | None:
    """Two formulas in the wanted relation, one with `size` operators and the other with at most as many."""
    used = draws.chosen(_USED, VARIABLES).tolist()
    longer = [_formula(draws, used, size) for _ in range(_POOL)]
    shorter = [_formula(draws, used, draws.below(size + 1)) for _ in range(_POOL)]
    first, second = (longer, shorter) if draws.below(2) else (shorter, longer)
    related = _relations(_tables(first)[:, None], _tables(second)[None, :])
    found = np.argwhere(related == wanted)
    if not len(found):
        return None
    row, column = found[draws.below(len(found))].tolist()
    return first[row], second[column]


def _tables(formulas: list[_Formula]) -> np.ndarray:
    return np.array([formula.table for formula in formulas], dtype=np.uint64)


def _relations(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Index into RELATIONS of each pair of truth tables: int64, of the shape that both broadcast to.

    -1 where a side is always true or always false.
    """
    forwards, backwards = (left & ~right) == 0, (right & ~left) == 0
    apart, covering = (left & right) == 0, (left | right) == _ALL
    cases = [forwards & backwards, forwards, backwards, apart & covering, apart, covering]
    related = np.select(cases, list(range(6)), default=6)
    plain = (left != 0) & (left != _ALL) & (right != 0) & (right != _ALL)
    return np.where(plain, related, -1)


def _formula(draws: Draws, used: list[int], operators: int) -> _Formula:
    """A random formula with exactly so many operators over the variables `used`."""
    if operators == 0:
        variable = used[draws.below(len(used))]
        return _Formula(b"abcdef"[variable : variable + 1], _COLUMNS[variable])
    operator = draws.below(3)
    if operator == 0:
        inner = _formula(draws, used, operators - 1)
        return _Formula(b"(not " + inner.text + b")", inner.table ^ _ALL)
    before = draws.below(operators)
    left, right = _formula(draws, used, before), _formula(draws, used, operators - 1 - before)
    if operator == 1:
        return _Formula(b"(" + left.text + b" and " + right.text + b")", left.table & right.table)
    return _Formula(b"(" + left.text + b" or " + right.text + b")", left.table | right.table)
